"Start every recipe by command, and keep a table of what passed: `python tools/recipes.py [--full] [--only NAME] [--out FILE]`"
import argparse, multiprocessing, sys, tempfile
from pathlib import Path

import pandas as pd

from interp_parts.core import get_method, method_names
from interp_parts.testing.recipes import try_recipe

TABLE = Path(__file__).parents[1]/'nbs'/'40_testing'/'recipes.csv'
STEPS = ['train','evaluate','visualize','predict']

def all_recipes()->dict:
    "Recipes of all methods by name, with their method"
    return {k:dict(method=m, **r) for m in method_names for k,r in get_method(m).recipes.items()}

def work(
    name:str, # Recipe
    small:bool, # A smaller backbone?
    to, # Where the row goes
):
    "What a process of its own does"
    with tempfile.TemporaryDirectory() as d: to.send(try_recipe(name, d, small))

def row(
    name:str, # Recipe
    small:bool, # A smaller backbone?
    limit:int=1800, # Seconds
)->dict:
    "What a process of its own says of a recipe"
    here,there = multiprocessing.get_context('fork').Pipe()
    p = multiprocessing.get_context('fork').Process(target=work, args=(name, small, there))
    p.start(); there.close()
    try: return here.recv() if here.poll(limit) else dict(recipe=name, train=f'stopped after {limit} s')
    except EOFError: return dict(recipe=name, train=f'the process ended, exit code {p.exitcode}')
    finally: p.kill(); p.join()

def in_order(
    recipes:dict, # All, by name
)->list:
    "Their names: first one of each method and data set"
    seen = {}
    for n,r in recipes.items(): seen.setdefault((r['method'], r.get('data')), []).append(n)
    return [ns[0] for ns in seen.values()] + [n for ns in seen.values() for n in ns[1:]]

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default=TABLE, help='table; recipes that passed in it are left out')
    parser.add_argument('--only', action='append', help='this recipe alone; may be repeated')
    parser.add_argument('--full', action='store_true', help='the published backbones and protocols, not small ones')
    args = parser.parse_args()
    out = Path(args.out)
    rows = pd.read_csv(out).to_dict('records') if out.exists() else []
    done = {r['recipe'] for r in rows if all(r[s] == 'ok' for s in STEPS)}
    for name in args.only or [n for n in in_order(all_recipes()) if n not in done]:
        rows = [r for r in rows if r['recipe'] != name] + [row(name, not args.full)]
        print(rows[-1], flush=True)
        pd.DataFrame(rows).reindex(columns=['recipe','method','data','backbone','base',*STEPS,'seconds']).to_csv(out, index=False)
    sys.exit(any(r.get(s) != 'ok' for r in rows for s in STEPS))

if __name__ == '__main__': main()
