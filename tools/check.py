"Checks that run no notebook: `python tools/check.py [clean export outputs imports links api house requirements reading surface cells] [--flags slow]`"
import argparse, ast, io, os, re, shutil, subprocess, sys, tempfile, tokenize
from collections import Counter
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

from execnb.nbio import read_nb

from notebooks import ROOT, cleaned, directives, is_test, notebooks, output_problems, settings, skip_reason
from house import modules, problems
from surface import changed, too_many

MAX_SKIPPED = 0.1 # of the cells that have something to test

def rel(
    path, # A file of the project
)->str:
    "The file's name from the project's root"
    return str(Path(path).relative_to(ROOT))

def clean():
    "Notebooks are as `nbdev_clean` leaves them"
    for f in notebooks():
        text = f.read_text(encoding='utf-8')
        if cleaned(text) != text: yield f'{rel(f)}: not clean; run "make clean"'

def python_files(
    root:Path, # A project
)->dict:
    "Content by name of everything that an export writes"
    files = [root/'pyproject.toml', *(root/'interp_parts').rglob('*.py')]
    return {str(f.relative_to(root)): f.read_text(encoding='utf-8') for f in files}

def export():
    "The package is what an export of the notebooks to an empty place gives"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for f in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/f, d)
        shutil.copytree(ROOT/'nbs', d/'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
        (d/'interp_parts').mkdir()
        shutil.copy(ROOT/'interp_parts'/'__init__.py', d/'interp_parts') # an export changes its version alone
        env = {k:v for k,v in os.environ.items() if k != 'IN_TEST'}
        code = 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()'
        subprocess.run([sys.executable, '-c', code], cwd=d, env=env, check=True)
        ours,fresh = python_files(ROOT),python_files(d)
    for f in sorted({*ours, *fresh}):
        if ours.get(f) == fresh.get(f): continue
        yield f'{f}: not what the notebooks export; edit the notebook, then run "make export"'

def outputs():
    "Saved outputs have no error, no path of a machine and no huge figure"
    for f in notebooks():
        for cell in read_nb(f).cells:
            for problem in output_problems(cell): yield f'{rel(f)}, cell {cell.idx_+1}: its output has {problem}'

def mixes_imports(
    cell, # A code cell
)->bool:
    "Would the making of pages, which runs cells with imports alone, run other code too?"
    if not is_test(cell) or {'export', 'exports', 'exporti'} & directives(cell).keys(): return False
    trees = cell.parsed_() or []
    is_import = lambda o: isinstance(o, (ast.Import, ast.ImportFrom))
    return any(map(is_import, ast.walk(ast.Module(trees, [])))) and not all(map(is_import, trees))

def imports():
    "Examples import in cells of their own, in notebooks that export"
    for f in notebooks():
        cells = read_nb(f).cells
        if not any('export' in directives(c) or 'show_doc(' in c.source for c in cells): continue
        for cell in filter(mixes_imports, cells):
            yield f'{rel(f)}, cell {cell.idx_+1}: imports and other code; pages need imports in a cell of their own'

def markdown_texts():
    "Name and text of all prose: markdown files, and the markdown cells of each notebook"
    for f in [*ROOT.glob('*.md'), *ROOT.glob('tests/**/*.md')]:
        yield f, f.read_text(encoding='utf-8')
    for f in notebooks(): yield f, '\n\n'.join(c.source for c in read_nb(f).cells if c.cell_type=='markdown')

_code = re.compile(r'^(```|~~~).*?^\1|`[^`\n]+`', re.MULTILINE | re.DOTALL)
_link = re.compile(r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|(?:src|href)="([^"]+)"')

def links():
    "Files that the prose links to exist"
    for f,text in markdown_texts():
        for target in map(lambda m: m[1] or m[2], _link.finditer(_code.sub('', text))):
            if re.match(r'[a-z][a-z+.-]*:|#', target): continue
            if (f.parent/unquote(target.split('#')[0])).exists(): continue
            yield f'{rel(f)}: links to {target}, which is not there'

def commented_lines(
    src:str, # A module's source
)->set:
    "Numbers of the lines that end in a comment"
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type==tokenize.COMMENT}

def arguments(
    fn:ast.FunctionDef, # A function
):
    "Its arguments, but for self and cls"
    a = fn.args
    found = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [o for o in found if o and o.arg not in ('self', 'cls')]

def documented(
    node, # A function or class definition
):
    "Name and line of everything about `node` that has to have a comment"
    if isinstance(node, ast.FunctionDef): return [(o.arg, o.end_lineno) for o in arguments(node)]
    inits = [o for o in node.body if isinstance(o, ast.FunctionDef) and o.name=='__init__']
    is_data = any('dataclass' in ast.unparse(o) for o in node.decorator_list)
    fields = [(o.target.id, o.end_lineno) for o in node.body if is_data and isinstance(o, ast.AnnAssign)]
    return fields + [m for o in inits for m in documented(o)]

def api():
    "Every public function and class has a docstring, and a comment on each argument"
    for f in sorted((ROOT/'interp_parts').rglob('*.py')):
        src = f.read_text(encoding='utf-8')
        lines = commented_lines(src)
        for node in ast.parse(src).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0]=='_': continue
            if not ast.get_docstring(node): yield f'{rel(f)}: {node.name} has no docstring'
            missing = [name for name,line in documented(node) if line not in lines]
            if missing: yield f"{rel(f)}: {node.name}: no comment on {', '.join(missing)}"

def house():
    "Imports go down, without circles; see tools/house.py"
    yield from problems()

def requirements():
    "Whatever the package imports is declared in settings.ini; what only a function imports may be declared for an extra"
    plain = lambda o: re.split(r'[^A-Za-z0-9._-]', o)[0].lower().replace('_', '-')
    declared = {plain(o) for o in settings().requirements.split()}
    extra = {plain(o) for k,v in settings().d.items() if k.startswith('extra_') for o in v.split()}
    names,seen = packages_distributions(),{}
    for m in modules(ROOT).values():
        for node in ast.walk(m.tree):
            tops = [o.name for o in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: tops = [node.module]
            for o in tops: seen.setdefault((o.split('.')[0], node.col_offset > 0), m.name)
    for (top,inside),where in sorted(seen.items()):
        if top in sys.stdlib_module_names or top == 'interp_parts': continue
        if not (declared | extra if inside else declared) & {plain(o) for o in names.get(top, [top])}: yield f'{where} imports {top}; declare it in settings.ini'

def surface():
    "Public names, arguments and default values are those of tests/surface.txt, and there are no more than its limit"
    yield from too_many()
    for l in changed(): yield f'{l}; if this is meant, run "make surface" and say so in CHANGELOG.md'

MINUTES = 15, 20 # to read a notebook: what a page shows, and with its hidden cells; 200 words or 25 lines a minute

def minutes(
    nb, # A notebook
)->tuple:
    "Minutes to read it, without and with hidden cells"
    shown = hidden = 0
    for cell in nb.cells:
        if cell.cell_type == 'markdown': shown += len(cell.source.split())/200
        elif cell.cell_type == 'code' and not {'default_exp'} & directives(cell).keys() and 'nbdev_export'+'(' not in cell.source:
            lines = sum(bool(l.strip()) and not l.startswith('#|') for l in cell.source.splitlines())/25
            if 'hide' in directives(cell): hidden += lines
            else: shown += lines
    return shown, shown+hidden

def reading():
    "A notebook of the package is read in fifteen minutes"
    for f in notebooks():
        nb = read_nb(f)
        if not any('default_exp' in directives(c) for c in nb.cells): continue
        for got,most,what in zip(minutes(nb), MINUTES, ('shown', 'with hidden cells')):
            if got > most: yield f'{rel(f)}: {got:.1f} minutes to read, {what}; split it by idea, or hide tests of edge cases'

def cells(
    flags=(), # Flags whose cells run
):
    "Few cells are skipped"
    reasons = [skip_reason(c, flags) for f in notebooks() for c in read_nb(f).cells if is_test(c)]
    skipped = Counter(o for o in reasons if o)
    part = skipped.total()/max(len(reasons), 1)
    why = ', '.join(f'{n} {flag}' for flag,n in skipped.most_common()) or 'none'
    print(f'{len(reasons)-skipped.total()} cells run, {skipped.total()} skipped ({why}): {part:.1%}')
    if part > MAX_SKIPPED: yield f'more than {MAX_SKIPPED:.0%} of the cells are skipped'

checks = {f.__name__:f for f in (clean, export, outputs, imports, links, api, house, requirements, reading, surface, cells)}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help=f"of {', '.join(checks)}; default all")
    parser.add_argument('--flags', default='', help='flags whose cells run too, such as realdata,slow')
    args = parser.parse_args()
    os.chdir(ROOT)
    checks['cells'] = partial(cells, args.flags.replace(',', ' ').split())
    problems = [f'{name}: {p}' for name in args.names or checks for p in checks[name]()]
    print(*problems, sep='\n', end='\n' if problems else '')
    sys.exit(bool(problems))

if __name__ == '__main__': main()
