"Write tests/api.txt, the public names with their arguments and default values: `python tools/api.py [--check]`"
import argparse, ast, difflib, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT/'tests'/'api.txt'

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

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; fail if something was changed')
    files = sorted(f for f in (ROOT/'interp_parts').glob('*.py') if f.stem[0] != '_')
    new,old = [t for f in files for t in surface(f)],FILE.read_text().splitlines() if FILE.exists() else []
    if parser.parse_args().check:
        changed = list(difflib.unified_diff(old, new, 'tests/api.txt', 'interp_parts', n=0, lineterm=''))
        sys.exit('\n'.join([*changed, 'if this is meant, run "make api" and say so in CHANGELOG.md']) if changed else 0)
    FILE.write_text('\n'.join(new)+'\n', encoding='utf-8')
    print(f'{len(new)} names in {FILE.relative_to(ROOT)}')

if __name__ == '__main__': main()
