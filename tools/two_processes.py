"""Train and score every method by command in one process and in two, and write how far apart they are.

    python tools/two_processes.py nbs/results/training_at_size_processes.csv

Chance is taken out where each process has its own: dropout, random colours and moves, the choice of contrast partners.
"""
import io, json, sys, tempfile, time
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd, torch
from safetensors.torch import load_file

from interp_parts.command.cli import run_command
from interp_parts.core import get_method, method_names
from interp_parts.files import read_json
from interp_parts.synthetic.birds import synthetic_birds
from interp_parts.training.fit import read_history

STILL = dict(degrees=0, scale=[1,1], shift=0)
OWN = dict(region_grouping=dict(pad=True),
           contrastive_reconstruction=dict(phi='test_resnet', phi_taps=[1,2], dilations=[1,2], kmeans=2, warp=dict(STILL, sigma=0),
                                           jitter=dict(p=0, grey=0), lambda_contrastive=0),
           visual_words=dict(n_parts=12, last_epochs=2), activation_diversity=dict(dropout=0, window=[89,89]),
           part_discovery=dict(stride=8, dropout=0, recolour=False, move=STILL))

def words(method, birds, out, runs):
    "A small training by command"
    own,base = OWN.get(method, {}),get_method(method).base
    w = ['train', method, '--data', 'cub', '--path', birds, '--out', out, '--backbone', 'test_resnet', '--no-pretrained', '--size', 64,
         '--resize', 'squash', '--bs', 8, '--epochs', 3, '--workers', 0, '--device', 'cpu', '--sync-bn', '--quiet']
    if method != 'nonparametric_prototypes': w += ['--freeze-bn']
    if method != 'classifier' and 'n_parts' not in own: w += ['--n-parts', 4]
    if base: w += ['--init', runs/f'{base}-1']
    return [*w, *(o for k,v in own.items() for o in ('--set', f'{k}={json.dumps(v)}'))]

def run(*w):
    "Run a command; an error unless it ends well"
    with redirect_stdout(io.StringIO()): code = run_command([str(o) for o in w])
    if code: raise SystemExit(f'exit code {code}: {w}')

def farthest(a, b):
    "Largest difference of two sets of tensors, and its name"
    off = {k:(v.double()-b[k].double()).abs().max().item() for k,v in a.items() if v.is_floating_point() and v.numel()}
    return max((v,k) for k,v in off.items())

def scores(out, *more):
    run('evaluate', out, '--device', 'cpu', '--workers', 0, '--no-baselines', *more)
    return read_json(out/'metrics.json')

def compare(method, birds, runs):
    "How far a training in two processes is from one in one process"
    one,two = runs/f'{method}-1',runs/f'{method}-2'
    run(*words(method, birds, one, runs))
    run(*words(method, birds, two, runs), '--num-processes', 2)
    first = [read_history(r).filter(like='train_').iloc[0] for r in (one, two)]
    off,name = farthest(*(load_file(r/'model.safetensors') for r in (one, two)))
    return dict(method=method, first_epoch_losses=((first[0]-first[1]).abs()/first[0].abs().clip(1)).max(), weights=off, tensor=name,
                same_scores=scores(one) == scores(one, '--num-processes', 2))

if __name__ == '__main__':
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as d:
        birds = synthetic_birds(Path(d)/'birds', n=48, size=64, seed=0)
        for m in method_names:
            start = time.time()
            rows.append(compare(m, birds, Path(d)))
            print(json.dumps(rows[-1]), f'{time.time()-start:.0f} s', flush=True)
    pd.DataFrame(rows).to_csv(sys.argv[1], index=False, float_format='%.1e')
