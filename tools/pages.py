"Prepare the notebooks for Quarto in _proc; `--render` makes the site in _docs: `python tools/pages.py [--render]`"
import argparse, os, re, shutil, subprocess, sys, warnings
from pathlib import Path

from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent

def prepare():
    "Write nbs/nbdev.yml, nbs/sidebar.yml and _proc; a notebook that cannot be prepared is shown with its first error"
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    try: proc_nbs(n_workers=0, force=True)
    except Exception as e:
        first = re.search(r'^\w+(?:Error|Exception): .*', str(e.__cause__), re.MULTILINE)
        sys.exit(f"{e}\n{first[0] if first else ''}")

def render():
    "Let Quarto turn _proc into the site"
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=ROOT/'_proc', check=True)
    shutil.rmtree(ROOT/'_docs', ignore_errors=True)
    shutil.move(ROOT/'_proc'/'_docs', ROOT/'_docs')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--render', action='store_true', help='run Quarto too')
    args = parser.parse_args()
    if args.render and not shutil.which('quarto'):
        sys.exit('quarto: not found; install it from https://quarto.org/docs/get-started, then run "make docs" again')
    os.chdir(ROOT)
    os.environ['PYTHONWARNINGS'] = 'ignore'
    warnings.simplefilter('ignore')
    prepare()
    if args.render: render()

if __name__ == '__main__':
    main()
    sys.stdout.flush()
    os._exit(0) # nbdev keeps a shell for each notebook, and IPython would tidy up each of them now: as long as the work itself

