"Write README.md and README_files/ from nbs/index.ipynb: `python tools/readme.py [--check]`"
import argparse, posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
_direc = re.compile(r'^\s*#\s*\|.*\n?', re.MULTILINE)
_link = re.compile(r'(\]\(|(?:src|href)=")(?![a-z][a-z+.-]*:|#|/)([^)"\s]+)')
NOTE = '<!-- Written from nbs/index.ipynb by "make readme": do not edit. -->\n\n'

def has(
    cell, # A notebook cell
    direc:str, # Such as 'hide' or 'echo: false'
)->bool:
    "Does the code cell carry this directive?"
    return cell.cell_type=='code' and bool(re.search(rf'^\s*#\s*\|\s*{direc}\s*$', cell.source, re.MULTILINE))

def from_root(
    text:str, # Prose of a notebook in nbs/
)->str:
    "The same prose with links that work from the project's root"
    return _link.sub(lambda m: m[1] + posixpath.normpath(f'nbs/{m[2]}'), text)

def prepare(
    nb, # The index notebook
):
    "Drop hidden cells and directives, name the language, and turn links to the root"
    nb.cells = [c for c in nb.cells if c.source.strip() and not has(c, 'hide')]
    nb.metadata['language_info'] = dict(name='python')
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = from_root(c.source)
        elif has(c, 'echo: false'): c.metadata['transient'] = dict(remove_source=True)
        if c.cell_type == 'code': c.source = _direc.sub('', c.source)
    return nb

def render()->dict:
    "Content by name of README.md and its pictures"
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    alts = [m[1] for c in nb.cells for m in re.finditer(r'^#\| fig-alt: "(.*)"$', c.source, re.MULTILINE)]
    nb = prepare(nb)
    body,res = MarkdownExporter().from_notebook_node(nb, dict(unique_key='README', output_files_dir='README_files'))
    body = re.sub(r'<style.*?</style>\n?', '', body, flags=re.DOTALL)
    for alt in alts: body = body.replace('![png]', f'![{alt}]', 1)
    body = re.sub(r'\n{3,}', '\n\n', '\n'.join(o.rstrip() for o in body.splitlines())).strip()
    return {'README.md': f'{NOTE}{body}\n'.encode(), **res.get('outputs', {})}

def current()->dict:
    "The same as it lies in the project"
    files = [ROOT/'README.md', *(ROOT/'README_files').glob('*')]
    return {f.relative_to(ROOT).as_posix(): f.read_bytes() for f in files if f.exists()}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; fail when something would change')
    check,new,old = parser.parse_args().check,render(),current()
    stale = sorted(o for o in {*new, *old} if new.get(o) != old.get(o))
    if check: sys.exit(f"{', '.join(stale)}: not what nbs/index.ipynb gives; run \"make readme\"" if stale else 0)
    for name in stale:
        (ROOT/name).parent.mkdir(exist_ok=True)
        if name in new: (ROOT/name).write_bytes(new[name])
        else: (ROOT/name).unlink()
    print('\n'.join(stale) or 'README.md is up to date')

if __name__ == '__main__': main()
