"Run all checks and all notebooks, some at a time: `python tools/test.py [--flags slow] [--workers 2]`"
import argparse, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor

from notebooks import ROOT, notebooks

LIMIT = 900 # seconds for one step

def steps(
    flags:str, # Flags whose cells run, separated by spaces
)->dict:
    "Arguments of python by step; later notebooks tend to take longer, so they start first"
    names = [str(f.relative_to(ROOT)) for f in reversed(notebooks())]
    test = 'from nbdev.test import nbdev_test; nbdev_test.__wrapped__({!r}, flags={!r}, n_workers=0)'
    checks = ('clean', 'export', 'outputs', 'imports', 'links', 'api', 'cells')
    return {'pages': ['tools/pages.py'], 'parity': ['tests/parity.py', 'tests/fixtures/parity', '--selftest'],
            **{o:['-c', test.format(o, flags)] for o in names},
            'readme': ['tools/readme.py', '--check'], 'surface': ['tools/api.py', '--check'],
            **{o:['tools/check.py', o, '--flags', flags] for o in checks}}

def run(
    name:str, # Of the step
    args:list, # Arguments of python
)->tuple:
    "Run one step, print a line about it, and all it said if it failed; returns its success and the lines it said"
    start,pipes = time.time(),dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        res = subprocess.run([sys.executable, *args], cwd=ROOT, timeout=LIMIT, **pipes)
        ok,said = res.returncode==0,res.stdout
    except subprocess.TimeoutExpired as e: ok,said = False,(e.stdout or b'') + f'\nstopped after {LIMIT} s'.encode()
    said = said.decode(errors='replace').strip()
    print(f"{'ok  ' if ok else 'FAIL'} {time.time()-start:5.0f} s  {name}" + ('' if ok else f'\n{said}'), flush=True)
    return ok, said.splitlines()

def untracked()->set:
    "Files that git neither tracks nor ignores"
    git = ['git', 'ls-files', '--others', '--exclude-standard']
    return set(subprocess.run(git, cwd=ROOT, text=True, capture_output=True).stdout.splitlines())

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', default='', help='flags whose cells run too, such as slow')
    parser.add_argument('--workers', type=int, default=2, help='steps at a time')
    args = parser.parse_args()
    data,flags = os.environ.get('INTERP_PARTS_DATA'),args.flags.replace(',', ' ').split()
    if data: flags.append('realdata')
    os.environ['OMP_NUM_THREADS'] = '1'
    todo,before = steps(' '.join(flags)),untracked()
    with ThreadPoolExecutor(args.workers) as pool: results = dict(zip(todo, pool.map(run, todo, todo.values())))
    left = sorted(untracked() - before)
    print('FAIL' if left else 'ok  ', '        left behind:', ', '.join(left) or 'nothing')
    failed = sum(not ok for ok,_ in results.values()) + bool(left)
    print(f"realdata cells {'run on INTERP_PARTS_DATA' if data else 'are skipped: set INTERP_PARTS_DATA to run them'}")
    for name,n in dict(parity=2, cells=1).items(): print(f"{name}: {', '.join(results[name][1][-n:])}")
    print(f'{len(todo)+1-failed} passed, {failed} failed')
    sys.exit(failed > 0)

if __name__ == '__main__': main()
