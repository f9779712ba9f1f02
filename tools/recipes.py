"Start every recipe by command, and keep a table of what passed: `python tools/recipes.py [--small] [--only NAME] [--out FILE]`"
import argparse, json, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd

from interp_parts.command.settings import all_recipes

TABLE = Path(__file__).parents[1]/'nbs'/'40_testing'/'recipes.csv'
STEPS = ['train','evaluate','visualize','predict']
ONE = 'import json, sys; from interp_parts.testing.recipes import try_recipe; ' \
      'print(json.dumps(try_recipe(sys.argv[1], sys.argv[2], small=sys.argv[3] == "small")))'

def row(
    name:str, # Recipe
    small:bool, # A smaller backbone?
)->dict:
    "What a process of its own says of a recipe"
    with tempfile.TemporaryDirectory() as d:
        done = subprocess.run([sys.executable, '-c', ONE, name, d, 'small' if small else 'full'], capture_output=True, text=True)
    if done.returncode: return dict(recipe=name, train=(done.stderr.strip().splitlines() or ['killed'])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default=TABLE, help='table; recipes that passed in it are left out')
    parser.add_argument('--only', action='append', help='this recipe alone; may be repeated')
    parser.add_argument('--small', action='store_true', help='a smaller backbone of the same family')
    args = parser.parse_args()
    out = Path(args.out)
    rows = pd.read_csv(out).to_dict('records') if out.exists() else []
    names = args.only or [n for n in all_recipes() if n not in {r['recipe'] for r in rows if all(r[s] == 'ok' for s in STEPS)}]
    for name in names:
        rows = [r for r in rows if r['recipe'] != name] + [row(name, args.small)]
        print(rows[-1], flush=True)
        cols = ['recipe','method','data','backbone','base',*STEPS,'seconds']
        pd.DataFrame(rows).reindex(columns=cols).to_csv(out, index=False)
    sys.exit(any(r.get(s) != 'ok' for r in rows for s in STEPS))

if __name__ == '__main__': main()
