"Write tests/surface.txt, the public names with their arguments and default values: `python tools/surface.py`"
import ast, difflib, tempfile
from pathlib import Path

from notebooks import ROOT

FILE = ROOT/'tests'/'surface.txt'

def signature(
    fn:ast.FunctionDef, # A function
)->str:
    "Its arguments with their default values, without annotations"
    a = fn.args
    for o in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if o: o.annotation = None
    return f'({ast.unparse(a)})'

def of_class(
    node:ast.ClassDef, # A class
):
    "Its bases, fields, and public methods"
    yield f"{node.name}({', '.join(map(ast.unparse, node.bases))})"
    for o in node.body:
        if isinstance(o, (ast.Assign, ast.AnnAssign)) and (text := assigned(o)): yield f'{node.name}.{text}'
        if isinstance(o, ast.FunctionDef) and (o.name[0] != '_' or o.name == '__init__'):
            yield f'{node.name}.{o.name}{signature(o)}'

def assigned(
    node, # An assignment
)->str:
    "Names, and the value if it is a literal, if the names are public"
    names = [ast.unparse(t) for t in getattr(node, 'targets', None) or [node.target]]
    if any(n[0] == '_' for n in names): return ''
    try: return ' = '.join([*names, repr(ast.literal_eval(node.value))])
    except (ValueError, TypeError): return ' = '.join(names)

def surface(
    file:Path, # A module
):
    "A line for each public name"
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)): text = [assigned(node)]
        elif isinstance(node, ast.FunctionDef) and node.name[0] != '_': text = [node.name+signature(node)]
        elif isinstance(node, ast.ClassDef) and node.name[0] != '_': text = of_class(node)
        else: continue
        yield from (t for t in text if t)

def lines(
    folder:Path=ROOT/'interp_parts', # A package
)->list:
    "The surface of all modules of all packages"
    files = [f for f in sorted(folder.rglob('*.py')) if f.stem[0] != '_']
    name = lambda f: '.'.join(f.relative_to(folder).with_suffix('').parts)
    return [f'{name(f)}.{t}' for f in files for t in surface(f)]

MOST = 508 # Public functions and classes of the package, methods counted with their class; raise it only for new features

def public(
    folder:Path=ROOT/'interp_parts', # A package
)->list:
    "Dotted names of its public functions and classes"
    patched = lambda o: any('patch' in ast.unparse(d) for d in o.decorator_list)
    return [f"{'.'.join(f.relative_to(folder).with_suffix('').parts)}.{o.name}"
            for f in sorted(folder.rglob('*.py')) if f.stem[0] != '_' for o in ast.parse(f.read_text(encoding='utf-8')).body
            if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name[0] != '_' and not patched(o)]

def too_many(
    folder:Path=ROOT/'interp_parts', # A package
    most:int=MOST, # Public names, at most
)->list:
    "One line if the package has more public names than `most`"
    n = len(public(folder))
    if n <= most: return []
    return [f'{n} public functions and classes, {most} at most; make those private that no user calls and no other '
            'module needs, or methods of the class they work on']

def sees_packages()->bool:
    "Does a module that is added in a sub-package show?"
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'data'/'readers'/'added.py'
        f.parent.mkdir(parents=True)
        f.write_text('def added(n=3): "A new name"')
        f.with_name('_private.py').write_text('def unseen(): "Of a private module"')
        seen = lines(Path(d)) == ['data.readers.added.added(n=3)'] and public(Path(d)) == ['data.readers.added.added']
        return seen and not too_many(Path(d), 1) and len(too_many(Path(d), 0)) == 1

def changed()->list:
    "What is no longer as it was written down"
    if not sees_packages(): return ['tools/surface.py does not see modules in sub-packages']
    old = FILE.read_text(encoding='utf-8').splitlines()
    return list(difflib.unified_diff(old, lines(), FILE.name, 'interp_parts', n=0, lineterm=''))

if __name__ == '__main__':
    FILE.write_text('\n'.join(lines())+'\n', encoding='utf-8')
    print(f'{len(lines())} names in {FILE.relative_to(ROOT)}, {len(public())} functions and classes of at most {MOST}')
