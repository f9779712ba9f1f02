"Write tests/surface.txt, the public names with their arguments and default values: `python tools/surface.py`"
import ast, difflib
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
        yield from (f'{file.stem}.{t}' for t in text if t)

def lines()->list:
    "The surface of all modules"
    return [t for f in sorted((ROOT/'interp_parts').glob('*.py')) if f.stem[0] != '_' for t in surface(f)]

def changed()->list:
    "What is no longer as it was written down"
    old = FILE.read_text(encoding='utf-8').splitlines()
    return list(difflib.unified_diff(old, lines(), FILE.name, 'interp_parts', n=0, lineterm=''))

if __name__ == '__main__':
    FILE.write_text('\n'.join(lines())+'\n', encoding='utf-8')
    print(f'{len(lines())} names in {FILE.relative_to(ROOT)}')
