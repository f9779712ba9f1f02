"Load runs of older code and compare what they give with what it was: `python tests/old_runs.py [--selftest]`"
import argparse, configparser, importlib, json, os, shutil, subprocess, sys, tempfile, traceback
from functools import cache
from pathlib import Path

import numpy as np, torch

HERE = Path(__file__).resolve().parent
RUNS = HERE/'fixtures'/'runs'
METHODS = ('classifier', 'region_grouping', 'contrastive_reconstruction', 'visual_words', 'activation_diversity',
           'classification_specific_parts')
RESUMED = 'region_grouping' # its state/ is that of a training which was stopped in its second epoch
FIELDS = ('maps', 'presence', 'boxes', 'logits', 'embedding', 'target', 'contribution', 'constant')
# On another kind of machine, bounds of the difference over the largest recorded value, or over 1 if that is less;
# measured with other instructions of the same processor: 1.5e-6 and 1.5e-4
ANSWERS,WEIGHTS = 1e-4,1e-3

def processor()->str:
    "The processor's name, or an empty word where the system does not tell"
    file = Path('/proc/cpuinfo')
    lines = file.read_text().splitlines() if file.exists() else []
    return next((l.partition(':')[2].strip() for l in lines if l.startswith('model name')), '')

@cache
def machine()->str:
    "What the last bit of a result depends on"
    return f'torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor()}'

def pictures(
    side:int, # Height and width, in pixels
)->np.ndarray:
    "Two images (2,3,H,W) of bytes, by a formula on whole numbers: no random number, no rounding"
    b,c,y,x = np.ogrid[:2,:3,:side,:side]
    wave = lambda v: abs(v % 512 - 256).clip(0, 255)
    return ((wave(16*x + 40*c + 90*b) + wave(24*y - 8*x + 60*c))//2).astype(np.uint8)

def answers(
    run, # Folder of a run
    images:np.ndarray=None, # Bytes (B,3,H,W); None: `pictures` of the run's size
)->tuple:
    "Arrays by name that the loaded run gives, those of `Parts` which are not None; and the images"
    from interp_parts.training import load_run
    learn = load_run(run)
    images = pictures(learn.dls.view.size) if images is None else images
    mean,std = (torch.tensor(s)[:,None,None] for s in learn.dls.stats)
    parts = learn.model.parts((torch.from_numpy(images)/255 - mean)/std)
    found = {k:getattr(parts, k) for k in FIELDS}
    return {k:v.numpy() for k,v in found.items() if v is not None},images

def read(
    file, # npz file
)->tuple:
    "Recorded arrays by name, the images they are of, and the machine they come from"
    with np.load(file, allow_pickle=False) as z: arrays = dict(z)
    images,where = arrays.pop('images'),str(arrays.pop('machine'))
    return arrays,images,where

def record():
    "Write `expected.npz` of each run"
    for m in METHODS:
        arrays,images = answers(RUNS/m)
        np.savez_compressed(RUNS/m/'expected.npz', machine=machine(), images=images, **arrays)

def command(
    *words, # Of `interp-parts`
    cwd, # Folder where it runs
):
    "Run the command as settings.ini names it"
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(HERE.parent/'settings.ini')
    module,_,function = ini['DEFAULT']['console_scripts'].partition('=')[2].partition(':')
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    code = f'from {module} import {function}; {function}()'
    done = subprocess.run([sys.executable, '-c', code, *words], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"interp-parts {words[0]}: {done.stderr.strip().splitlines()[-1]}")

def resume(
    run, # Folder of a run with a state within its training
)->dict:
    "Weights after the training went on from the state, on synthetic images made anew"
    from safetensors.numpy import load_file
    with tempfile.TemporaryDirectory() as d:
        shutil.copytree(run, Path(d)/'run')
        (Path(d)/'run'/'model.safetensors').unlink() # or the run counts as finished
        s = json.loads((run/'settings.json').read_text())
        method = s.pop('method')
        (Path(d)/'settings.json').write_text(json.dumps(s))
        command('synthesize', 'birds', s['path'], '--n', '48', cwd=d)
        command('train', method, '--config', 'settings.json', '--workers', '0', '--device', 'cpu', '--out', 'run',
                '--resume', cwd=d)
        return load_file(Path(d)/'run'/'model.safetensors')

def difference(
    ours:np.ndarray, # What the code gives
    theirs:np.ndarray, # What was recorded
)->float:
    "Largest absolute difference; infinite if shapes or kinds differ, or if one alone is not a number"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype: return np.inf
    if np.array_equal(ours, theirs): return 0.
    delta = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)
    return np.inf if np.isnan(delta) else delta

def limit(
    theirs:np.ndarray, # What was recorded
    bound:float, # Of the difference over the largest value, or 0
)->float:
    "Largest difference that passes"
    if theirs.dtype.kind != 'f': return 0.
    return bound*max(1., np.abs(theirs).max(initial=0))

def shifted(
    a:np.ndarray, # A recorded array
    by:float, # Its limit
)->np.ndarray:
    "The array with its last element moved by one unit in the last place, or by 3 limits if there is one"
    a = a.copy()
    if a.dtype.kind != 'f': a.flat[-1] ^= 1
    elif by: a.flat[-1] += 3*by
    else: a.flat[-1] = np.nextafter(a.flat[-1], a.dtype.type(np.inf))
    return a

class Tally:
    "Counts comparisons, prints a line for each run"
    def __init__(self,
        selftest:bool=False, # Compare shifted arrays too?
    ): self.selftest,self.compared,self.failed,self.missed,self.loose = selftest,0,0,0,''

    def line(self, name, ours, theirs, bound):
        "Compare two dictionaries of arrays; the bound is that of `limit`"
        both = [k for k in theirs if k in ours]
        absent = sorted(ours.keys() ^ theirs.keys())
        deltas = {k:difference(ours[k], theirs[k]) for k in both}
        bad = [k for k in both if not deltas[k] <= limit(theirs[k], bound)] + absent
        self.compared,self.failed = self.compared+len(both),self.failed+len(bad)
        said = f"  FAIL: {', '.join(bad)}" if bad or not both else '  ok'
        self.failed += not both
        print(f'{name:40} {len(both):3} arrays  max|Δ| {max(deltas.values(), default=np.inf):9.3g}'
              f'{said}{self.shift(both, ours, theirs, bound)}', flush=True)

    def shift(self, both, ours, theirs, bound):
        "With the self-test: how many shifts were seen"
        if not self.selftest: return ''
        blind = [k for k in both if self.blind(ours[k], theirs[k], limit(theirs[k], bound))]
        self.missed += len(blind)
        return f'  {len(both)-len(blind)} shifts seen' + f", MISSED: {', '.join(blind)}"*bool(blind)

    def blind(self, ours, theirs, by): return difference(ours, shifted(theirs, by)) <= by

    def fail(self, name, what):
        "A failure that is not a comparison"
        self.failed += 1
        print(f'{name:40} FAIL: {what}', flush=True)

def compare(
    tally:Tally, # Where results go
    name:str, # Of a method
):
    "Load the run and compare its answers"
    theirs,images,where = read(RUNS/name/'expected.npz')
    ours,_ = answers(RUNS/name, images)
    if where != machine(): tally.loose = where
    tally.line(name, ours, theirs, ANSWERS*(where != machine()))

def compare_resumed(
    tally:Tally, # Where results go
    name:str, # Of a method whose run has a state
):
    "Let its training go on, and compare the weights with those of the run"
    from safetensors.numpy import load_file
    *_,where = read(RUNS/name/'expected.npz')
    tally.line(f'{name}, resumed', resume(RUNS/name), load_file(RUNS/name/'model.safetensors'),
               WEIGHTS*(where != machine()))

def attempt(tally, name, work):
    "An error is a failure"
    try: work(tally, name)
    except Exception as e:
        traceback.print_exc()
        tally.fail(name, f'{type(e).__name__}: {e}'.splitlines()[0])

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--selftest', action='store_true', help='shift recorded arrays too: every one must fail')
    parser.add_argument('--record', action='store_true', help='write what the runs give now, instead of comparing')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.record: return record()
    tally,found = Tally(args.selftest),{f.name for f in RUNS.iterdir() if f.is_dir()} if RUNS.is_dir() else set()
    for name in sorted(found ^ set(METHODS)):
        tally.fail(name, 'not in the list of this script' if name in found else 'no such run')
    for name in METHODS:
        if name in found: attempt(tally, name, compare)
    if RESUMED in found: attempt(tally, RESUMED, compare_resumed)
    if tally.loose: print(f'recorded with {tally.loose}; this is {machine()}: differences within a bound pass')
    if args.selftest: print(f'{tally.compared} shifted, {tally.compared-tally.missed} seen, {tally.missed} missed')
    print(f'{tally.compared} compared, {tally.failed} failed')
    sys.exit(bool(tally.failed or tally.missed))

if __name__ == '__main__': main()
