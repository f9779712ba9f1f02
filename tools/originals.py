"Run every command of the page for users of the original repositories, and keep a table of what passed: `python tools/originals.py [SECTION ...] [--out FILE]`"
import argparse, multiprocessing, sys, tempfile
from datetime import date
from pathlib import Path

import pandas as pd

from interp_parts.testing.originals import original_commands, run_originals

NBS = Path(__file__).parents[1]/'nbs'
PAGE,TABLE = NBS/'tutorials'/'from_the_originals.ipynb',NBS/'40_testing'/'originals.csv'

def work(
    rows, # Of one section
    to, # Where the results go
):
    "What a process of its own does"
    with tempfile.TemporaryDirectory() as d: to.send(run_originals(rows, Path(d)/'work').result.tolist())

def results(
    rows, # Of one section
    limit:int=3600, # Seconds
)->list:
    "Results of the commands of a section, run in a process of its own"
    here,there = multiprocessing.get_context('fork').Pipe()
    p = multiprocessing.get_context('fork').Process(target=work, args=(rows, there))
    p.start(); there.close()
    try: return here.recv() if here.poll(limit) else [f'stopped after {limit} s']*len(rows)
    except EOFError: return [f'the process ended, exit code {p.exitcode}']*len(rows)
    finally: p.kill(); p.join()

def missing(
    rows, # All commands of the page
    table, # What passed before
)->list:
    "Sections with a command that has not passed as it stands on the page"
    passed = set(table[table.result == 'ok'].command) if len(table) else set()
    return rows[~rows.command.isin(passed)].section.unique().tolist()

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('sections', nargs='*', metavar='SECTION', help='default: those with a command that has not passed')
    parser.add_argument('--out', default=TABLE, help='the table')
    args = parser.parse_args()
    rows = original_commands(PAGE).dropna(subset='words').reset_index(drop=True)
    rows['command'] = rows.words.map(' '.join)
    table = pd.read_csv(args.out) if Path(args.out).exists() else pd.DataFrame(columns=['section','theirs','command','result','date'])
    for section in args.sections or missing(rows, table):
        some = rows[rows.section == section]
        some = some.assign(result=results(some), date=date.today().isoformat())
        print(some[['theirs','result']].to_string(), flush=True)
        table = pd.concat([table[table.section != section], some[['section','theirs','command','result','date']]])
        order = {s:i for i,s in enumerate(rows.section.unique())}
        table = table.sort_values('section', key=lambda s: s.map(order), kind='stable')
        table.to_csv(args.out, index=False)
    sys.exit(bool((table.result != 'ok').any()))

if __name__ == '__main__': main()
