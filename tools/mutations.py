"Change exported code in small ways, one at a time, in a copy, and see if tests fail: `python tools/mutations.py [--guards]`"
import argparse, ast, csv, os, random, re, shutil, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

from execnb.nbio import read_nb, write_nb

from notebooks import ROOT, directives, notebooks

KINDS = ('constant', 'sign', 'dropped term', 'axis', 'comparison')
PICTURES = re.compile(r'visualization\..*|synthetic\..*|.*\.pictures') # cosmetics: no test can know better
LIMIT = 900 # seconds for one notebook
SLOW = f'not done after {LIMIT} s' # proves nothing: the machine may be busy
REDUCE = set('mean sum max min amax amin argmax argmin softmax log_softmax cat stack flatten unflatten transpose topk '
             'sort norm normalize std var cumsum all any gather index_add_ squeeze unsqueeze logsumexp'.split())
SIGNS = {ast.Lt:'<', ast.GtE:'>=', ast.Gt:'>', ast.LtE:'<=', ast.Eq:'==', ast.NotEq:'!=', ast.Is:'is',
         ast.IsNot:'is not', ast.In:'in', ast.NotIn:'not in'}
SWAPPED = {ast.Lt:'>=', ast.GtE:'<', ast.Gt:'<=', ast.LtE:'>', ast.Eq:'!=', ast.NotEq:'==', ast.Is:'is not',
           ast.IsNot:'is', ast.In:'not in', ast.NotIn:'in'}

@dataclass
class Change:
    "New text for a piece of an exported cell"
    nb:str # Notebook, from the project's root
    cell:str # Id of the cell
    start:int # First character of the piece
    end:int # Character after its last
    new:str # What stands there instead
    kind:str # One of `KINDS`
    where:str # Function or class it is in
    line:str='' # The line, as it was and as it is

def module_of(
    nb, # A notebook
)->str:
    "Module that a notebook exports to, or None"
    found = [m[1] for c in nb.cells if (m := re.match(r'#\|\s*default_exp\s+(\S+)', c.source))]
    return found[0] if found else None

def quiet(
    node, # A node of a syntax tree
)->bool:
    "Is it the text of a message, or something that is said?"
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)): return True
    return isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', '')) in ('print','warn')

def walk(
    node, # Where to start
    where:str='', # Function or class it is in
):
    "All nodes but those of messages, each with the function or class it is in"
    if quiet(node): return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): where = f'{where}.{node.name}'.strip('.')
    yield node,where
    for child in ast.iter_child_nodes(node): yield from walk(child, where)

def text_like(
    node, # An operation
)->bool:
    "Does it join strings, lists or paths rather than numbers?"
    kinds = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple, ast.Set, ast.Dict)
    def is_text(o): return isinstance(o, kinds) or isinstance(o, ast.Constant) and isinstance(o.value, str)
    return any(map(is_text, ast.walk(node)))

def axis_of(
    node, # A call
):
    "Numbers of dimensions among its arguments"
    name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
    args = [k.value for k in node.keywords if k.arg in ('dim', 'axis')]
    if name in REDUCE: args += [a for a in node.args if is_number(a) or isinstance(a, ast.UnaryOp)]
    for a in args:
        a = a.operand if isinstance(a, ast.UnaryOp) else a
        if is_number(a) and isinstance(a.value, int): yield a

def is_number(node): return isinstance(node, ast.Constant) and type(node.value) in (int, float)

def changes(
    src:str, # An exported cell's source
):
    "Kind, place, new text and surrounding function of everything that could be changed"
    tree,offsets = ast.parse(src),[0]
    for l in src.splitlines(keepends=True): offsets.append(offsets[-1] + len(l.encode()))
    at = lambda line,col: len(src.encode()[:offsets[line-1]+col].decode())
    place = lambda o: (at(o.lineno, o.col_offset), at(o.end_lineno, o.end_col_offset))
    text,axes = lambda o: src[slice(*place(o))],set()
    for node,where in walk(tree):
        if isinstance(node, ast.Call):
            for a in axis_of(node):
                axes.add(id(a))
                yield 'axis', place(a), str(1-a.value if a.value < 2 else a.value-1), where
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            span = place(node.left)[1],place(node.comparators[0])[0]
            old = src[slice(*span)]
            yield 'comparison', span, old.replace(SIGNS[type(node.ops[0])], SWAPPED[type(node.ops[0])], 1), where
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)) and not text_like(node):
            if not isinstance(node.op, ast.Mult):
                span,op = (place(node.left)[1], place(node.right)[0]),'+-'[isinstance(node.op, ast.Sub)]
                yield 'sign', span, src[slice(*span)].replace(op, '-+'['+-'.index(op)], 1), where
            span = place(node)
            left = src[span[0]:place(node.left)[1]]
            yield 'dropped term', span, left + ')'*(left.count('(') - left.count(')')), where
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield 'sign', place(node), text(node.operand), where
        if is_number(node) and id(node) not in axes and (isinstance(node.value, int) or abs(node.value) >= 1e-3):
            v = node.value
            yield 'constant', place(node), str(v+1 if isinstance(v, int) else 2*v or 1.), where

def parses(src):
    try: ast.parse(src); return True
    except SyntaxError: return False

def all_changes(
    root:Path, # A copy of the project
)->dict:
    "Changes by notebook, and its lines of exported code"
    out = {}
    for f in sorted(root/o.relative_to(ROOT) for o in notebooks()):
        if not f.exists(): continue
        nb = read_nb(f)
        name = module_of(nb)
        if name is None or PICTURES.fullmatch(name): continue
        found,lines = [],0
        for c in nb.cells:
            if 'export' not in directives(c): continue
            lines += sum(bool(l.strip()) for l in c.source.splitlines())
            for kind,(a,b),new,where in changes(c.source):
                changed = c.source[:a] + new + c.source[b:]
                if c.source[a:b] == new or not parses(changed): continue
                n = c.source[:a].count('\n')
                was,now = [s.splitlines()[n].strip() for s in (c.source, changed)]
                found.append(Change(str(f.relative_to(root)), c.id, a, b, new, kind, where, f'{was}  ->  {now}'))
        out[str(f.relative_to(root))] = lines,found
    return out

def choose(
    root:Path, # A copy of the project
    n:int, # How many
    seed:int, # Of the choice
)->list:
    "Changes drawn at random: a notebook by its lines, a kind, then a place"
    rng,every,out = random.Random(seed),all_changes(root),[]
    names = sorted(every)
    while len(out) < n:
        name = rng.choices(names, [every[k][0] for k in names])[0]
        kind = rng.choice(KINDS)
        of_kind = [c for c in every[name][1] if c.kind == kind]
        if of_kind and (c := rng.choice(of_kind)) not in out: out.append(c)
    return out

def importers(
    root:Path, # A copy of the project
    module:str, # Name of a module
)->list:
    "Notebooks that import it, those with the fewest lines first"
    word,found = re.compile(rf'interp_parts\.{re.escape(module)}\b'),[]
    for f in (root/'nbs').rglob('*.ipynb'):
        if 'tutorials' in f.parts: continue # they take minutes
        code = [c.source for c in read_nb(f).cells if c.cell_type == 'code']
        if any(word.search(s) for s in code): found.append((sum(len(s) for s in code), f))
    return [f for _,f in sorted(found)]

NOTEBOOK = 'import sys; from nbdev.test import nbdev_test; nbdev_test.__wrapped__(sys.argv[1], n_workers=0)'

def tests(
    root:Path, # A copy of the project
    nb:Path, # A notebook of it
    most:int, # Importing notebooks at most
)->dict:
    "Arguments of python by test: the notebook, those that import its module, recorded numbers, and the public surface"
    module = module_of(read_nb(nb))
    nbs = [nb, *[f for f in importers(root, module) if f != nb][:most]]
    word = re.compile(rf'interp_parts\.{re.escape(module)}\b')
    methods = [f.stem.removeprefix('parity_') for f in sorted((root/'tests').glob('parity_*.py'))
               if word.search(f.read_text(encoding='utf-8'))]
    return {**{str(f.relative_to(root/'nbs')):['-c', NOTEBOOK, str(f.relative_to(root))] for f in nbs}, 'surface':['tools/check.py', 'surface'],
            **{f'parity {m}':['tests/parity.py', 'tests/fixtures/parity', m] for m in methods}}

def test(
    root:Path, # A copy of the project
    args:list, # Arguments of python
)->str:
    "Run a test; '' if it passes, otherwise how it failed"
    env = {**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'Agg'}
    try: res = subprocess.run([sys.executable, *args], cwd=root, env=env, timeout=LIMIT, capture_output=True, text=True)
    except subprocess.TimeoutExpired: return SLOW
    if res.returncode == 0: return ''
    said = re.sub(r'\x1b\[[0-9;]*m', '', res.stderr).split('nbdev Tests Failed')[0].strip().splitlines()
    said = said or res.stdout.splitlines()
    error = re.compile(r'\s*\w*(Error|Exception|Interrupt|Fail)')
    return next(filter(error.match, reversed(said)), said[-1] if said else '?').strip()

def apply(
    root:Path, # A copy of the project
    c:Change, # What to change
)->dict:
    "Change the notebook's cell and the module; returns what the files were"
    nb = read_nb(root/c.nb)
    cell = next(o for o in nb.cells if getattr(o, 'id', None) == c.cell)
    old = cell.source
    cell.source = old[:c.start] + c.new + old[c.end:]
    body = lambda s: '\n'.join(l for l in s.splitlines() if not re.match(r'#\|', l)).strip()
    py = root.joinpath('interp_parts', *module_of(nb).split('.')).with_suffix('.py')
    files = {f:f.read_text(encoding='utf-8') for f in (py, root/c.nb)}
    assert files[py].count(body(old)) == 1, f'{py.name}: the cell is not there once'
    py.write_text(files[py].replace(body(old), body(cell.source)), encoding='utf-8')
    write_nb(nb, root/c.nb)
    return files

def tried(
    root:Path, # A copy of the project
    c:Change, # What to change
    most:int, # Importing notebooks at most
)->tuple:
    "Which test saw the change ('' if none did), and how"
    files = apply(root, c)
    try:
        todo = tests(root, root/c.nb, most)
        for name,args in todo.items():
            if (said := test(root, args)) and said != SLOW: return name, said
        return '', f'{len(todo)} tests do not fail'
    finally:
        for f,text in files.items(): f.write_text(text, encoding='utf-8')

def guards(
    root:Path, # A copy of the project
):
    "Changes of tools/guards.csv: what somebody was once hurt by is switched off; each with its kind and the notebook that has to fail"
    with open(ROOT/'tools'/'guards.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    for r in rows:
        file = f"nbs/{r['notebook']}.ipynb"
        found = [c for c in read_nb(root/file).cells if 'export' in directives(c) and r['old'] in c.source]
        assert len(found) == 1, f"{file}: {len(found)} cells hold {r['old']}"
        at = found[0].source.index(r['old'])
        yield Change(file, found[0].id, at, at+len(r['old']), r['new'], r['item'], r['test'], f"{r['old'].strip()}  ->  {r['new'].strip()}")

def try_guard(
    root:Path, # A copy of the project
    c:Change, # From `guards`; `where` is the notebook that has to fail
)->str:
    "How its notebook failed; '' if it did not"
    files = apply(root, c)
    try: return test(root, ['-c', NOTEBOOK, f'nbs/{c.where}.ipynb'])
    finally:
        for f,text in files.items(): f.write_text(text, encoding='utf-8')

def try_guards(
    only, # Numbers of the changes to try; empty: all
)->int:
    "Try the changes of tools/guards.csv and print which were seen; returns how many were not"
    missed = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as d:
        root = Path(d).resolve()
        copied(root)
        for i,c in enumerate(guards(root)):
            if only and i not in only: continue
            start,said = time.time(),try_guard(root, c)
            if not said or said == SLOW: missed.append(i)
            print(f"{i:2} {'NOT CAUGHT' if i in missed else 'caught'} ({time.time()-start:.0f} s) {c.kind} {c.where}: {c.line}\n   {said[:100]}", flush=True)
    print(f'{len(missed)} not caught: {missed}')
    return len(missed)

def copied(
    to:Path, # An empty folder
    commit:str='', # Of git; empty: the files as they are
):
    "A copy of what the tests need"
    if commit:
        tar = subprocess.run(['git','archive',commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(['tar','-x'], cwd=to, input=tar, check=True); return
    for f in subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines():
        if (ROOT/f).is_file(): (to/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/f, to/f)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0, help='of the choice')
    parser.add_argument('--n', type=int, default=20, help='how many changes')
    parser.add_argument('--only', default='', help='numbers of the changes to try, such as 3,7; default all')
    parser.add_argument('--skip', default='', help='numbers of changes that change nothing; others take their place')
    parser.add_argument('--most', type=int, default=8, help='importing notebooks to run at most, shortest first')
    parser.add_argument('--commit', default='', help='try the files of this commit instead of those that are there')
    parser.add_argument('--list', action='store_true', help='only say what would be tried')
    parser.add_argument('--no-baseline', action='store_true', help='do not see that the tests pass without a change')
    parser.add_argument('--guards', action='store_true', help='the changes of tools/guards.csv instead of random ones')
    args = parser.parse_args()
    only,skip = (set(map(int, filter(None, o.split(',')))) for o in (args.only, args.skip))
    if args.guards: sys.exit(try_guards(only) > 0)
    caught,ran = {},{}
    with tempfile.TemporaryDirectory() as d:
        root = Path(d).resolve()
        copied(root, args.commit)
        for i,c in enumerate(choose(root, args.n + len(skip), args.seed)):
            if i in skip or only and i not in only: continue
            start = time.time()
            print(f'{i:2} {c.kind:12} {Path(c.nb).stem}: {c.where}\n   {c.line}', flush=True)
            if args.list: continue
            by,said = tried(root, c, args.most)
            caught[i] = by
            ran |= {k:v for k,v in tests(root, root/c.nb, args.most).items() if k == by}
            print(f"   {'caught by '+by if by else 'NOT CAUGHT'} ({time.time()-start:.0f} s): {said[:100]}", flush=True)
        wrong = [] if args.list or args.no_baseline else [name for name,v in ran.items() if test(root, v)]
    if args.list: return
    fine = '' if args.no_baseline else f'; {len(ran)} tests pass unchanged'
    n = sum(bool(by) and by not in wrong for by in caught.values()) # what fails anyway proves nothing
    print(f'{n} of {len(caught)} caught' + (f'; FAIL WITHOUT A CHANGE: {wrong}' if wrong else fine))
    sys.exit(bool(wrong) or n < .9*len(caught))

if __name__ == '__main__': main()
