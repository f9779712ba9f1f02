"Prepare the notebooks for Quarto in _proc, and with `--render` make the site in _docs: `python tools/pages.py [--render]`"
import argparse, os, shutil, subprocess, sys
from pathlib import Path

from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent

def render():
    "Let Quarto turn _proc into the site"
    if not shutil.which('quarto'): sys.exit('quarto: not found; install it from https://quarto.org/docs/get-started, then run "make docs" again')
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=ROOT/'_proc', check=True)
    shutil.rmtree(ROOT/'_docs', ignore_errors=True)
    shutil.move(ROOT/'_proc'/'_docs', ROOT/'_docs')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--render', action='store_true', help='run Quarto too')
    args = parser.parse_args()
    os.chdir(ROOT)
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    proc_nbs(n_workers=2, force=True)
    if args.render: render()

if __name__ == '__main__': main()
