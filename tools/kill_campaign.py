"Kill trainings at random moments and resume them: `python tools/kill_campaign.py all --kills 20 --save-every 2`"
import argparse, os, random, signal, sys, tempfile, threading, time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from interp_parts.command.runs import train_run
from interp_parts.core import PartLearner, get_method, method_names
from interp_parts.synthetic import synthetic_birds
from interp_parts.testing.contract import small_settings
from interp_parts.training import SaveState, read_history, read_state

KINDS = ('batch', 'time', 'valid', 'save') # How moments are chosen, in turn

class Marks:
    "Appends a letter for what a process does (B batch, V validation, S save, f file, s saved); dies where told to"
    def __init__(self,
        file, # Where letters are appended
        die=None, # Letter, how many of them before, and seconds after it
    ):
        self.fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.letter,self.left,self.delay = die or ('',0,0.)

    def __call__(self, letter):
        os.write(self.fd, letter.encode())
        if letter != self.letter: return
        self.left -= 1
        if self.left >= 0: return
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        if self.delay: threading.Timer(self.delay, kill).start()
        else: kill()

def watch(
    mark:Marks, # Of this process
):
    "Mark every batch and every step of a save"
    one,save = PartLearner.one_batch,SaveState.save
    def one_batch(self, i, b): mark('B' if self.training else 'V'); return one(self, i, b)
    def saving(self, *a): mark('S'); save(self, *a); mark('s')
    PartLearner.one_batch,SaveState.save = one_batch,saving
    for name in ('fsync', 'replace'): # the moments of a save between which files differ
        def stepping(*a, real=getattr(os, name)):
            mark('f'); out = real(*a); mark('f')
            return out
        setattr(os, name, stepping)

def child(
    method:str, # Registered name
    run:Path, # Folder of the run
    settings:dict, # From `small_settings`
    out:Path, # File for what is printed
    marks:Path, # File for what is done
    die=None, # Letter and number of the mark at which it kills itself
)->int:
    "Train in a forked process; returns its number"
    if pid := os.fork(): return pid
    try:
        with open(out, 'w', buffering=1) as f:
            os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
            watch(Marks(marks, die))
            train_run(method, run, settings, resume=True)
            code = 0
    except BaseException as e: print(f'{type(e).__name__}: {e}', flush=True); code = 1
    os._exit(code)

def wait(
    pid:int, # Of a child
    most:float=None, # Seconds, after which it is killed
    until=lambda: False, # Also an end of waiting
)->int|None:
    "Wait for a process, or kill it; returns its exit code, negative if it was killed, None if it still runs"
    start = time.time()
    while True:
        got,status = os.waitpid(pid, os.WNOHANG)
        if got: return os.waitstatus_to_exitcode(status)
        if until(): return
        if most is not None and time.time()-start > most: os.kill(pid, signal.SIGKILL); most = None
        time.sleep(.01)

def same(x, y):
    "Are two states the same, to the last bit?"
    if isinstance(x, dict): return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list,tuple)): return len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

def differences(
    a:Path, # Run
    b:Path, # Another
)->list:
    "What of weights, optimiser state and history differs between two finished runs"
    weights = [load_file(r/'model.safetensors') for r in (a,b)]
    out = [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])]
    loops = [torch.load(r/'state'/read_state(r)['files']['loop'], weights_only=True) for r in (a,b)]
    out += [k for k in ('opt','dls') if not same(loops[0][k], loops[1][k])]
    logs = [read_history(r).drop(columns='time', errors='ignore') for r in (a,b)]
    return out + ['history.csv']*(not logs[0].equals(logs[1]))

def moment(
    rng:random.Random, # Source of chance
    kind:str, # One of `KINDS`
    start:float, # Seconds to the first batch
    train:float, # Seconds from there to the end
    n_valid:int, # Batches of one validation
)->tuple:
    "When to kill: after so many seconds, or at which mark"
    if kind == 'time': return rng.uniform(.5*start, start + train/3),None
    if kind == 'batch': return None,('B', rng.randrange(6), rng.uniform(.001, .3))
    if kind == 'valid': return None,('V', rng.randrange(n_valid), rng.uniform(.001, .05))
    return None,('f', rng.randrange(24), 0.)

def campaign(
    method:str, # Registered name
    folder:Path, # Where runs go
    birds:Path, # Data
    kills:int=20, # How many
    save_every:int=2, # Steps between saves
    workers:int=2, # Processes that read images in the runs that are killed; the undisturbed one has none
    epochs:int=3, # Of each training
    seed:int=0, # Of the moments
    bases:Path=None, # Folder with the runs that methods start from
)->bool:
    "Kill runs until there were `kills` kills; print a table; True if nothing differs"
    rng = random.Random(f'{seed} {method}')
    make = lambda **kw: small_settings(method, birds, bases, bs=4, epochs=epochs, **kw)
    whole,marks = folder/method/'whole',folder/method/'whole.marks'
    t = time.time()
    pid = child(method, whole, make(workers=0), folder/method/'whole.txt', touch(marks))
    begun = lambda: bool(marks.read_bytes())
    code = wait(pid, until=begun)
    start = time.time()-t
    if code is not None or wait(pid): raise SystemExit((folder/method/'whole.txt').read_text())
    train,done = time.time()-t-start,marks.read_text()
    total,n_valid = done.count('B'),done.count('V')//epochs
    print(f'{method}: undisturbed {start:.0f} s to the first batch, then {train:.0f} s, {total} batches', flush=True)
    n,bad,runs,batches = 0,[],0,0
    while n < kills or not runs:
        run,runs = folder/method/f'run{runs}',runs+1
        while True:
            said,marks = folder/method/'said.txt',touch(folder/method/'marks')
            kind = KINDS[n % len(KINDS)] if n < kills else None
            after,die = moment(rng, kind, start, train, n_valid) if kind else (None,None)
            code = wait(child(method, run, make(workers=workers, save_every=save_every), said, marks, die), after)
            done,words = marks.read_text(),said.read_text()
            batches += done.count('B')
            begun = next((l for l in words.splitlines() if l.startswith('resumed')), None)
            where = begun or ('from the beginning' if done else 'not resumed yet')
            if code == -signal.SIGKILL:
                n += 1
                print(f'  kill {n:2}: {where}; killed in {place(done)} after {done.count("B")} batches', flush=True)
            elif code: bad.append(words.splitlines()[-1]); print(f'  FAILED: {bad[-1]}'); break
            else: print(f'  finished: {where}', flush=True); break
        if code == 0: bad += differences(whole, run)
        if code: break
    most = runs*total + n*(save_every+1)
    ok = not bad and batches <= most
    print(f'{method}: {n} kills, {len(bad)} differences (weights, optimiser state, history.csv without time)'
          f'{": " + ", ".join(map(str, bad[:5])) if bad else ""}, batches {batches} <= {runs} x {total} + {n} x '
          f'({save_every} + 1) = {most}{"" if batches <= most else " DOES NOT HOLD"}', flush=True)
    return ok

def place(
    done:str, # Marks of a process
)->str:
    "What a process was doing when it was killed"
    if not done: return 'its preparations'
    if done.count('S') > done.count('s'): return 'a save'
    last = done.rstrip('f')[-1:]
    return {'B':'the training', 'V':'the validation', 's':'the training'}.get(last, 'its preparations')

def touch(
    f:Path, # To be emptied
)->Path:
    "An empty file, with its folder"
    f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(b'')
    return f

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('method', help='a method, several with commas, or all')
    p.add_argument('--kills', type=int, default=20); p.add_argument('--save-every', type=int, default=2)
    p.add_argument('--workers', type=int, default=2); p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--seed', type=int, default=0); p.add_argument('--images', type=int, default=48)
    a = p.parse_args()
    torch.set_num_threads(1) # a process that is forked has no other
    names = method_names if a.method == 'all' else a.method.split(',')
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        birds = synthetic_birds(d/'birds', n=a.images, size=64, seed=0)
        for base in {get_method(n).base for n in names} - {None}:
            with redirect_stdout(open(os.devnull, 'w')): train_run(base, d/'base'/base, small_settings(base, birds))
        good = [campaign(n, d, birds, a.kills, a.save_every, a.workers, a.epochs, a.seed, d/'base') for n in names]
    sys.exit(not all(good))

if __name__ == '__main__': main()
