"Run notebooks and save their outputs: `python tools/notebooks.py [FILES] [--flags realdata,slow] [--workers 2]`"
import argparse, json, os, re, subprocess, sys, tempfile, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from execnb.nbio import nb2str, read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent
MAX_FIGURE = 100 # KB, so that the notebooks stay readable in a browser and small in git

def settings():
    "What settings.ini says, wherever the caller stands"
    with working_directory(ROOT): return get_config()

def notebooks():
    "All notebooks of the project, in reading order"
    files = (ROOT/'nbs').rglob('*.ipynb')
    return sorted(f for f in files if not any(o[0] in '._' for o in f.relative_to(ROOT).parts))

def directives(
    cell, # A notebook cell
)->dict:
    "The `#|` lines of a code cell, such as `{'export': []}`"
    return extract_directives(cell, remove=False) if cell.cell_type=='code' else {}

def skip_reason(
    cell, # A code cell
    flags=(), # Flags whose cells run
):
    "The flag that keeps `cell` from running, or None"
    direcs = directives(cell)
    if direcs.get('eval:', [''])[0].lower() == 'false': return 'eval: false'
    return next((o for o in settings().tst_flags.split() if o in direcs and o not in flags), None)

def is_test(
    cell, # A notebook cell
)->bool:
    "Is this a code cell that a test of the notebook runs, or would run but for its flags?"
    return cell.cell_type=='code' and bool(cell.source.strip()) and 'nbdev_export'+'(' not in cell.source

def cleaned(
    text:str, # A notebook file's content
)->str:
    "What `nbdev_clean` makes of a notebook"
    nb,cfg = json.loads(text),settings()
    keys = [cfg[o].split() for o in ('allowed_metadata_keys', 'allowed_cell_metadata_keys')]
    clean_nb(nb, cfg.clear_all, *keys, cfg.clean_ids)
    return nb2str(nb)

def machine_paths()->re.Pattern:
    "Paths that say on which machine a notebook ran"
    own = map(Path, (ROOT.parent, Path.home(), tempfile.gettempdir(), os.environ.get('INTERP_PARTS_DATA', '/')))
    own = [re.escape(f'{o}/') for o in own if len(o.parts) > 1]
    return re.compile('|'.join([*own, r'(?<![\w.])/(?:home|root|tmp|Users|var/folders)/', 'site-packages']))

def output_problems(
    cell, # A notebook cell
):
    "What must not be committed among the outputs of `cell`"
    for out in cell.get('outputs', []):
        if out['output_type'] == 'error': yield f"an error: {out['ename']}: {out['evalue']}"
        data = dict(out.get('data', {}), text=out.get('text', ''))
        for kind,val in data.items():
            val = ''.join(val) if isinstance(val, list) else str(val)
            if kind.startswith('image/'):
                size = len(val)*3//4//1024
                if size > MAX_FIGURE: yield f'a figure of {size} KB; at most {MAX_FIGURE}: show less, or smaller'
            elif found := machine_paths().search(val): yield f'a path of this machine: {val[found.start():][:80]!r}'

class Shell(CaptureShell):
    "A `CaptureShell` that keeps the last state of what is written over again, such as a progress bar"
    def _run(self, *args, **kwargs):
        res = super()._run(*args, **kwargs)
        last = {(o.transient or {}).get('display_id', i): o for i,o in enumerate(res.display_objects)}
        for o in ('stdout', 'stderr'): res[o] = re.sub(r'[^\n]*\r', '', res[o])
        res.display_objects = [o for o in last.values() if o.data.get('text/html', 'x').strip()]
        return res

def quiet_warnings():
    "Show a warning without the file that gave it, and none about the future of other libraries"
    warnings.formatwarning = lambda msg, category, *_, **__: f'{category.__name__}: {msg}\n'
    for o in (DeprecationWarning, FutureWarning): warnings.simplefilter('ignore', o)

def run_notebook(
    path:Path, # Notebook to run
    flags=(), # Flags whose cells run
)->str:
    "The notebook's content after running it; skipped cells keep the outputs they have"
    nb,shell = read_nb(path),Shell(path.resolve(), mpl_format='png')
    quiet_warnings()
    with working_directory(path.parent):
        for cell in nb.cells:
            if not is_test(cell) or skip_reason(cell, flags): continue
            cell.outputs = []
            shell.cell(cell)
            if shell.exc: sys.exit(f'{cell.source}\n{shell.prettytb(path.name)}')
            for problem in output_problems(cell):
                sys.exit(f'{path.name}, cell {cell.idx_+1}: its output has {problem}\n{cell.source}')
    return cleaned(nb2str(nb))

def save_outputs(
    path:Path, # Notebook to run
    flags=(), # Flags whose cells run
):
    "Run the notebook and write it with its outputs"
    text = run_notebook(path, flags)
    path.write_text(text, encoding='utf-8')
    print(f'{path.name}: {len(text)//1024} KB')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', type=Path, help='notebooks; default all')
    parser.add_argument('--flags', default='', help='flags whose cells run too, such as realdata,slow')
    parser.add_argument('--workers', type=int, default=2, help='notebooks at a time')
    args = parser.parse_args()
    os.environ.update(IN_TEST='1', OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))
    if len(args.files) == 1: return save_outputs(args.files[0], args.flags.replace(',', ' ').split())
    one = lambda f: subprocess.run([sys.executable, __file__, f, '--flags', args.flags]).returncode
    with ThreadPoolExecutor(args.workers) as pool: failed = sum(map(bool, pool.map(one, args.files or notebooks())))
    sys.exit(f'{failed} notebooks failed' if failed else 0)

if __name__ == '__main__': main()
