"The rules of the house, checked: `python tools/house.py [--selftest]`; `--selftest` breaks each rule in a copy and must see it"
import ast, shutil, sys, tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from notebooks import ROOT

METHODS = ('region_grouping', 'contrastive_reconstruction', 'visual_words', 'activation_diversity',
           'classification_specific_parts', 'part_discovery', 'nonparametric_prototypes')
TOP = ('command', 'testing') # import anything; no layer and no method imports them
FACES = ('data', 'data.readers', 'synthetic', 'models', 'training', 'evaluation', 'visualization', *METHODS)
COMMON = ('PartLearner', 'create_learner', 'part_table', 'check_table', 'part_dls', 'load_image', 'fit_run', 'load_run')

@dataclass
class Module:
    "What a module of the package imports and defines"
    name:str # Dotted, below the package: 'data.table', 'data.__init__'
    tree:ast.Module # Its syntax tree

    @property
    def room(self)->str:
        "Folder it lies in, or its own name if it lies at the top"
        return self.name.split('.')[0]

    def absolute(self,
        node:ast.ImportFrom, # An import of this module
    )->str:
        "Dotted name, below the package, of what `node` imports from; None if that is elsewhere"
        if not node.level:
            top,_,rest = (node.module or '').partition('.')
            return rest if top == 'interp_parts' else None
        here = self.name.split('.')[:-node.level]
        return '.'.join([*here, *filter(None, [node.module])])

    def imports(self, names):
        "Pairs of a module of the package and a name from it, imported anywhere in this module"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((o.name.removeprefix('interp_parts.'), '') for o in node.names if o.name.startswith('interp_parts.'))
            if isinstance(node, ast.ImportFrom) and (base := self.absolute(node)) is not None:
                for o in node.names: yield _resolved(base, o.name, names)

    def defined(self):
        "Names that it defines at its top level"
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not _patched(node): yield node.name
            for t in getattr(node, 'targets', [getattr(node, 'target', None)]) if isinstance(node, (ast.Assign, ast.AnnAssign)) else []:
                yield from (o.id for o in ast.walk(t) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store))

def _patched(node): return any('patch' in ast.unparse(o) for o in node.decorator_list)

def _resolved(base, name, names):
    "`from data import table` imports a module, `from data.table import View` a name of one"
    inner = f'{base}.{name}'.strip('.')
    if inner in names or f'{inner}.__init__' in names: return inner, ''
    return base, name

_parsed = cache(ast.parse) # copies of the package differ in a module or two

def modules(
    root:Path, # A project
)->dict:
    "All modules of the package by name"
    folder = root/'interp_parts'
    found = {}
    for f in sorted(folder.rglob('*.py')):
        name = '.'.join(f.relative_to(folder).with_suffix('').parts)
        if name != '_modidx': found[name] = Module(name, _parsed(f.read_text(encoding='utf-8')))
    return found

def circles(
    graph:dict, # Successors by node
):
    "Groups of nodes that reach each other"
    order,low,stack,out = {},{},[],[]
    def visit(v):
        order[v] = low[v] = len(order)
        stack.append(v)
        for w in graph.get(v, ()):
            if w not in order: visit(w)
            if w in stack: low[v] = min(low[v], low[w])
        if low[v] == order[v]:
            i = stack.index(v)
            out.append(stack[i:])
            del stack[i:]
    for v in list(graph):
        if v not in order: visit(v)
    return [sorted(o) for o in out if len(o) > 1]

def edges(
    mods:dict, # From `modules`
):
    "Importing module, imported module, imported name"
    for m in mods.values():
        for to,name in m.imports(mods):
            to = to if to in mods else f'{to}.__init__'
            if to in mods: yield m.name,to,name

def down(mods):
    "1. Imports go down: no method imports another, no layer imports a method, nothing imports command or testing"
    for a,b,_ in edges(mods):
        x,y = mods[a].room,mods[b].room
        if x == y or x in TOP and y != 'testing': continue
        if y in TOP: yield f'{a} imports {b}; only notebooks and tools do'
        elif x in TOP: continue
        elif y in METHODS: yield f'{a} imports {b}, which belongs to a method; move what both need to a layer below'

def no_circle(mods):
    "2. No circle of imports, those inside functions included, neither of modules nor of rooms"
    names,rooms = defaultdict(set),defaultdict(set)
    for a,b,_ in edges(mods):
        if a.endswith('__init__'): continue
        names[a].add(b)
        if mods[a].room != mods[b].room: rooms[mods[a].room].add(mods[b].room)
    for found in [*circles(names), *circles(rooms)]: yield f"{', '.join(found)} import each other"

def no_private(mods):
    "3. No name with a leading underscore crosses a module"
    for a,b,name in edges(mods):
        if name[:1] == '_' and not name.startswith('__'): yield f'{a} imports {name} of {b}; make it public there, or keep it to one module'

def one_name(mods):
    "4. One public name, one thing"
    owners = defaultdict(list)
    for m in mods.values():
        for name in {*m.defined()}:
            if name[0] != '_': owners[name].append(m.name)
    for name,at in sorted(owners.items()):
        if len(at) > 1: yield f"{name} is defined in {', '.join(at)}"

def faces(mods):
    "5. `from interp_parts.SUBJECT import *` gives all public names of the subject, and what every method needs"
    for face in FACES:
        m = mods.get(f'{face}.__init__')
        if m is None: yield f'{face} has no __init__'; continue
        said = next((ast.unparse(o.value) for o in m.tree.body[::-1] if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__'), '')
        inside = [o for o in mods if o.startswith(face+'.') and o.count('.') == face.count('.')+1 and o != m.name]
        missing = [o for o in inside if f"*{o.split('.')[-1]}.__all__" not in said]
        missing += [o for o in COMMON if face in METHODS and f"'{o}'" not in said]
        if missing: yield f"{face} does not hand on {', '.join(missing)}"

def only_imports(mods):
    "6. A package's __init__ imports and lists names; it defines nothing"
    for m in mods.values():
        if not m.name.endswith('__init__'): continue
        for node in m.tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(getattr(node, 'value', None), ast.Constant): continue
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__': continue
            if getattr(node, 'name', '') == '__getattr__': continue # earlier names: Python looks for it here only
            yield f'{m.name} defines {ast.unparse(node).splitlines()[0]}; define it in a module'

rules = (down, no_circle, no_private, one_name, faces, only_imports)

def problems(
    root:Path=ROOT, # A project
):
    "What breaks a rule, a line each"
    mods = modules(root)
    for rule in rules: yield from (f'rule {rule.__doc__[0]}: {o}' for o in rule(mods))

SEEDS = ( # file, text added to it
    ('region_grouping/model.py', 'from interp_parts.visual_words.layer import log_similarity'),
    ('data/table.py', 'def _late():\n    from interp_parts.data.loaders import part_dls\n    return part_dls'),
    ('evaluation/landmarks.py', 'from interp_parts.data.table import _hidden'),
    ('evaluation/baselines.py', 'def part_dls(): "The same name again"'),
    ('training/extra.py', '__all__ = ["late"]\ndef late(): "A module that the face does not hand on"'),
    ('evaluation/__init__.py', 'def helper(): return 1'))

def selftest():
    "Break each rule in a copy of the package; returns the rules that did not see it"
    blind,known = [],{*problems()}
    for n,(file,text) in enumerate(SEEDS, 1):
        with tempfile.TemporaryDirectory() as d:
            shutil.copytree(ROOT/'interp_parts', Path(d)/'interp_parts', ignore=shutil.ignore_patterns('__pycache__'))
            with open(Path(d)/'interp_parts'/file, 'a', encoding='utf-8') as f: f.write(f'\n{text}\n')
            new = {*problems(Path(d))} - known
        seen = any(o.startswith(f'rule {n}') for o in new)
        print(f"rule {n}: {'caught' if seen else 'NOT CAUGHT'}: {file}: {text.splitlines()[0]}")
        if not seen: blind.append(n)
    return blind

def main():
    found = selftest() if '--selftest' in sys.argv else [*problems()]
    if '--selftest' not in sys.argv: print(*found, sep='\n', end='\n' if found else '')
    sys.exit(bool(found))

if __name__ == '__main__': main()
