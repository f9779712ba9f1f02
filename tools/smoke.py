"Import every module of the installed library, then render, train, evaluate and show a little: `python smoke.py`"
import importlib, pkgutil, subprocess, sys, tempfile
from pathlib import Path

import interp_parts

def command(
    *args, # Of `interp-parts`
):
    "Run the command as a user would"
    print('interp-parts', *args, flush=True)
    subprocess.run([sys.executable, '-c', 'from interp_parts.cli import main; main()', *map(str, args)], check=True)

def main():
    for o in pkgutil.walk_packages(interp_parts.__path__, 'interp_parts.'): importlib.import_module(o.name)
    with tempfile.TemporaryDirectory() as d:
        birds,run = Path(d)/'birds',Path(d)/'run'
        command('synthesize', 'birds', birds, '--n', 120)
        for method in ('region_grouping', 'classifier'):
            command('train', method, '--data', 'cub', '--path', birds, '--backbone', 'resnet18', '--no-pretrained',
                    '--epochs', 1, '--bs', 8, '--size', 64, '--device', 'cpu', '--out', run, '--overwrite')
            command('evaluate', run)
            command('visualize', run, '--n', 4)
    print('works with', *(f'{o} {importlib.import_module(o).__version__}' for o in ('torch', 'fastai', 'fastcore')))

if __name__ == '__main__': main()
