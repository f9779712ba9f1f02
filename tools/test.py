"Run all checks and all notebooks, some at a time: `python tools/test.py [--flags slow] [--workers 2]`"
import argparse, gc, multiprocessing, os, random, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from notebooks import ROOT, notebooks

LIMIT = 900 # seconds for one step
PRELOAD = 'nbdev.test fastai.vision.all timm pandas cv2 matplotlib.pyplot sklearn.cluster sklearn.svm scipy.io'.split()
server = multiprocessing.get_context('forkserver') # imports these once, and forks for each notebook: 5 s less for each
server.set_forkserver_preload(PRELOAD)

def command(
    log:Path, # File for all output
    args, # Arguments of python
)->bool:
    "Was it successful, within `LIMIT` seconds?"
    env = dict(os.environ, TMPDIR=str(log.parent)) # what it leaves there is removed with the folder
    try:
        with open(log, 'wb') as out:
            done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, timeout=LIMIT, stdout=out, stderr=out)
        return done.returncode == 0
    except subprocess.TimeoutExpired: return False

def notebook(
    log:Path, # File for all output
    nb:str, # Notebook, from the project's root
    flags:str, # Flags whose cells run
    seed:int, # Of the random numbers it draws without one of its own
)->bool:
    "Did its tests pass, within `LIMIT` seconds?"
    p = server.Process(target=test_notebook, args=(log, nb, flags, seed))
    p.start(); p.join(LIMIT)
    if p.exitcode is None: p.kill(); p.join()
    return p.exitcode == 0

def test_notebook(log, nb, flags, seed):
    "What the process of a notebook does"
    with open(log, 'wb') as out: [os.dup2(out.fileno(), fd) for fd in (1,2)]
    os.chdir(ROOT)
    os.environ['TMPDIR'],tempfile.tempdir = str(log.parent),None # what it leaves there is removed with the folder
    sys.argv,sys.path[0] = ['-c'],'' # as python -c has them
    multiprocessing.set_start_method(None, force=True) # the system's, not the server's
    gc.freeze() # what the server has imported stays: no collection looks at its 500,000 objects again
    import numpy, torch
    from nbdev.test import nbdev_test
    for start in random.seed, numpy.random.seed, torch.manual_seed: start(seed)
    nbdev_test.__wrapped__(nb, flags=flags, n_workers=0)

def steps(
    flags:str, # Flags whose cells run, separated by spaces
    seed:int, # As `notebook` takes it
)->dict:
    "Function of a log file by step; later notebooks tend to take longer, so they start first"
    python = lambda *args: partial(command, args=args)
    names = [str(f.relative_to(ROOT)) for f in reversed(notebooks())]
    checks = ('clean', 'export', 'outputs', 'imports', 'links', 'api', 'house', 'requirements', 'reading', 'surface', 'cells')
    return {'pages':python('tools/pages.py'), 'parity':python('tests/parity.py', 'tests/fixtures/parity', '--selftest'),
            **{o:partial(notebook, nb=o, flags=flags, seed=seed) for o in names}, 'readme':python('tools/readme.py', '--check'),
            'old runs':python('tests/old_runs.py', '--selftest'), 'old imports':python('tests/old_imports.py'),
            'house rules':python('tools/house.py', '--selftest'),
            **{o:python('tools/check.py', o, '--flags', flags) for o in checks}}

def run(
    name:str, # Of the step
    step, # Function of a log file: was it successful?
)->tuple:
    "Run one step, print a line about it, and all it said if it failed; returns its success and the lines it said"
    start = time.time()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as d:
        log = Path(d)/'log'
        ok = step(log)
        said = log.read_text(encoding='utf-8', errors='replace').strip() if log.exists() else ''
    took = time.time()-start
    if took >= LIMIT: said += f'\nstopped after {LIMIT} s'
    print(f"{'ok  ' if ok else 'FAIL'} {took:5.0f} s  {name}" + ('' if ok else f'\n{said}'), flush=True)
    return ok, said.splitlines()

def untracked()->set:
    "Files that git neither tracks nor ignores"
    git = ['git', 'ls-files', '--others', '--exclude-standard']
    return set(subprocess.run(git, cwd=ROOT, text=True, capture_output=True).stdout.splitlines())

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', default='', help='flags whose cells run too, such as slow')
    parser.add_argument('--workers', type=int, default=2, help='steps at a time')
    parser.add_argument('--seed', type=int, default=0, help='other random numbers, to find tests that fail by chance')
    args = parser.parse_args()
    data,flags = os.environ.get('INTERP_PARTS_DATA'),args.flags.replace(',', ' ').split()
    if data: flags.append('realdata')
    os.environ['OMP_NUM_THREADS'] = '1'
    todo,before = steps(' '.join(flags), args.seed),untracked()
    with ThreadPoolExecutor(args.workers) as pool: results = dict(zip(todo, pool.map(run, todo, todo.values())))
    left = sorted(untracked() - before)
    print('FAIL' if left else 'ok  ', '        left behind:', ', '.join(left) or 'nothing')
    failed = sum(not ok for ok,_ in results.values()) + bool(left)
    print(f"realdata cells {'run on INTERP_PARTS_DATA' if data else 'are skipped: set INTERP_PARTS_DATA to run them'}")
    told = {'parity':2, 'old runs':2, 'old imports':1, 'cells':1} # last lines of a step that are shown
    for name,n in told.items(): print(f"{name}: {', '.join(results[name][1][-n:])}")
    print(f'{len(todo)+1-failed} passed, {failed} failed')
    sys.exit(failed > 0)

if __name__ == '__main__': main()
