"""Prepare the notebooks for Quarto in _proc and check them there: `python tools/pages.py [--render | --check | --selftest]`

A page must keep its prose, name no object by its address, have no links within signatures, no links that leave and come back to the site or
lead to a place that is not there, and a text for each picture. `--check` looks at _proc as it is; `--selftest` shows that each check sees its fault; `--render` makes the site.
"""
import argparse, copy, html, json, os, posixpath, re, shutil, subprocess, sys, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUPS = { # of the sidebar: a page, a folder, or all pages of the top folder
    'Start': ['index.ipynb','guide'], 'Tutorials': ['tutorials'],
    'Methods': ['10_region_grouping','11_contrastive_reconstruction','12_visual_words','13_activation_diversity',
                '14_classification_specific_parts','15_part_discovery','16_nonparametric_prototypes'],
    'Data': ['01_data','02_synthetic'], 'Evaluation': ['20_evaluation','21_visualization'], 'Command': ['30_command','22_serving'],
    'Reference': ['.','03_models','04_training','40_testing'], 'Results': ['results']}
_fence = re.compile(r'```.*?```', re.DOTALL)
_linked = re.compile(r'\[(`?)([^\]\n]*?)\1\]\((https?://[^)\s]*)\)')

# The sidebar

def title(folder):
    "10_region_grouping -> Region grouping"
    return re.sub(r'^\d+\w?_', '', folder).replace('_', ' ').capitalize()

def entries(nbs, name):
    "What the sidebar shows of a page or a folder, folders within it as sections"
    at = nbs/name
    if at.is_file(): return [name]
    files = sorted(f for f in at.glob('*.ipynb') if f.name != 'index.ipynb' and f.name[0] not in '._')
    inner = [] if name == '.' else sorted(d for d in at.iterdir() if d.is_dir() and any(d.glob('*.ipynb')))
    rel = lambda p: p.relative_to(nbs).as_posix()
    return [*map(rel, files), *({'section':title(d.name), 'contents':entries(nbs, rel(d))} for d in inner)]

def sidebar(nbs):
    "The groups as Quarto's configuration, all folded"
    folded = lambda group,names: [e for n in names if (nbs/n).exists() for e in (
        [dict(section=title(n), contents=entries(nbs, n))] if n[0].isdigit() else entries(nbs, n))]
    groups = [dict(section=g, contents=folded(g, names)) for g,names in GROUPS.items()]
    return {'website':{'sidebar':{'style':'floating', 'collapse-level':1, 'contents':[g for g in groups if g['contents']]}}}

def listed(tree):
    "All pages of a sidebar"
    for e in tree: yield from [e] if isinstance(e, str) else listed(e['contents'])

# Texts of a page

def joined(o): return ''.join(o) if isinstance(o, list) else o or ''

def texts(cell):
    "Where the page has text: `(dictionary, key)`"
    if cell['cell_type'] != 'code': yield cell,'source'
    for o in cell.get('outputs', ()):
        if 'text' in o: yield o,'text'
        for k in o.get('data', ()):
            if k in ('text/markdown','text/html','text/plain'): yield o['data'],k

def pictures(cell): return [o['data']['image/png'] for o in cell.get('outputs', ()) if 'image/png' in o.get('data', {})]
def has_alt(cell): return re.search(r'^#\|\s*fig-alt:\s*\S', joined(cell['source']), re.MULTILINE)
def hidden(cell): return re.search(r'^#\|\s*(hide|include:\s*false)', joined(cell['source']), re.MULTILINE)

# Mending

def local(text, page, site):
    "The text with links to the site made relative to the page, and no links within code"
    plain = lambda m: _linked.sub(lambda l: l[2], m[0])
    text = _fence.sub(plain, text) if site in text else text
    def relative(m):
        path,_,at = m[1].partition('#')
        return posixpath.relpath(path, posixpath.dirname(page) or '.') + (f'#{at}' if at else '')
    return re.sub(re.escape(site) + r'/([^)\s"\'<>]+)', relative, text)

def slug(heading):
    "The place of a heading as pandoc and nbdev name it"
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)|\{[^}]*\}\s*$', r'\1', heading).replace('`', '').replace('*', '')
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', plain.strip().lower())))

def address(page, nb):
    "Path of the published page: nbdev leaves the number of a notebook out"
    named = re.search(r'^output-file: (\S+)', joined(nb['cells'][0]['source']) if nb['cells'] else '', re.MULTILINE)
    return posixpath.join(posixpath.dirname(page), named[1] if named else posixpath.basename(page).replace('.ipynb', '.html'))

def places(nb):
    "Where links can lead to on a page"
    every = '\n'.join(_fence.sub('', joined(at[k])) for c in nb['cells'] for at,k in texts(c) if k in ('source','text/markdown'))
    return {slug(h) for h in re.findall(r'^#{1,6}\s+(.*)$', every, re.MULTILINE)}

_inner = re.compile(r'\[(`?)([^\]\n]*?)\1\]\(([^)\s:]*\.html)#([^)\s]+)\)')

def nowhere(text, page, there):
    "Links of a text to places that no page has; `there`: the places of each page by its address"
    for m in _inner.finditer(text):
        to = posixpath.normpath(posixpath.join(posixpath.dirname(page), m[3]))
        if m[4] not in there.get(to, ()): yield m

def unlinked(text, page, there):
    "The text without links to places that no page has: nbdev links private names too, which no page shows"
    for m in nowhere(text, page, there): text = text.replace(m[0], f'{m[1]}{m[2]}{m[1]}')
    return text

def last_sentence(prose):
    "The sentence before a picture, without markup"
    lines = [l for l in prose.splitlines() if l.strip() and not l.startswith(('#','|','```',':::'))]
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', ' '.join(lines)).replace('`', '').replace('*', '')
    return re.split(r'(?<=[.!?])\s+', plain.strip().rstrip(':').strip())[-1].strip()

_no_head = re.compile(r'<th([^>]*)>(?:\s|&nbsp;)*</th>')

def valid(text):
    "Tables as pandas writes them, without an attribute that HTML no longer has and without empty heads"
    return _no_head.sub(r'<td\1></td>', text.replace('<style scoped>', '<style>'))

def mend(nb, page, site, there):
    "Relative links to places that are there, plain signatures, and for each picture without a text the sentence before it"
    said = ''
    for c in nb['cells']:
        for at,k in texts(c):
            at[k] = unlinked(local(joined(at[k]), page, site), page, there)
            if k == 'text/html': at[k] = valid(at[k])
        if c['cell_type'] == 'markdown' and last_sentence(joined(c['source'])): said = last_sentence(joined(c['source']))
        if pictures(c) and not has_alt(c) and said: c['source'] = f'#| fig-alt: {json.dumps(said, ensure_ascii=False)}\n' + joined(c['source'])
    return nb

# Checks

def title_cell(nb):
    "Text of the first cell, which becomes the title"
    return next((joined(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'), '')

def lost_prose(source):
    "Lines of the title cell that are neither title nor subtitle: nbdev drops them"
    lines = [l for l in title_cell(source).splitlines() if l.strip()]
    return [f'prose in the title cell is lost: {l[:60]}' for l in lines[:9] if not l.startswith(('# ','> ','<!--')) and not re.match(r'- \w+:', l)][:1]

def words(text): return re.sub(r'\W+', ' ', re.sub(r'\]\([^)]*\)(\{[^}]*\})?', '', html.unescape(text))).strip()

def missing_prose(source, page):
    "Prose of the notebook that is not on the page"
    there = words(' '.join(joined(c['source']) for c in page['cells']))
    prose = [joined(c['source']) for c in source['cells'] if c['cell_type'] == 'markdown'][1:]
    return [f'lost prose: {words(p)[:60]}' for p in prose if words(p)[:200] not in there]

def faults(source, page, site, rel='page.ipynb', there=None):
    "What is wrong with a page, in a line each"
    out = [*lost_prose(source), *missing_prose(source, page)]
    there = {address(rel, page):places(page)} if there is None else there
    for i,c in enumerate(page['cells']):
        for at,k in texts(c):
            t = joined(at[k])
            if m := re.search(r'\S* object at 0x\w*', t): out.append(f'cell {i}: an object by its address: {m[0][:60]}')
            if any('](http' in f for f in _fence.findall(t)) and 'source' != k: out.append(f'cell {i}: a link within a signature')
            if site in t: out.append(f'cell {i}: an absolute link to this site: {t[t.find(site):][:90].split(")")[0]}')
            for m in nowhere(t, rel, there): out.append(f'cell {i}: a link to a place that is not there: {m[3]}#{m[4]}')
            if k == 'text/html' and valid(t) != t: out.append(f'cell {i}: a table that is no valid HTML')
            if re.search(r'!\[\s*\]\(', t) or re.search(r'<img(?![^>]*\balt=)', t): out.append(f'cell {i}: a picture without a text')
        if pictures(c) and not has_alt(c) and not hidden(c): out.append(f'cell {i}: a picture without a text')
    return out

def site_of():
    "Where the site is published"
    conf = dict(re.findall(r'^(\w+) = (.*)$', (ROOT/'settings.ini').read_text(), re.MULTILINE))
    return conf['doc_host'] + conf['doc_baseurl']

def unreached(every, prepared, tree):
    "Pages that were not prepared, or that the sidebar does not name"
    for rel in sorted(set(every) - set(prepared)): yield f'{rel}: not prepared'
    for rel in sorted(set(every) - set(listed(tree))): yield f'{rel}: not in the sidebar'

def each_page(change=None):
    "Faults of the pages in _proc; `change` is applied to each first"
    proc,nbs,site = ROOT/'_proc',ROOT/'nbs',site_of()
    pages = {f.relative_to(proc).as_posix():json.loads(f.read_text()) for f in sorted(proc.rglob('*.ipynb')) if '_docs' not in f.parts}
    there = {address(rel, page):places(page) for rel,page in pages.items()}
    for rel,page in pages.items():
        if change: (proc/rel).write_text(json.dumps(change(page, rel, site, there), ensure_ascii=False))
        source = nbs/rel
        source = json.loads(source.read_text()) if source.exists() else dict(cells=[])
        for said in faults(source, page, site, rel, there): yield f'{rel}: {said}'
    every = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if not any(q[0] in '._' for q in p.relative_to(nbs).parts)}
    yield from unreached(every, pages, sidebar(nbs)['website']['sidebar']['contents'])

# Each check sees its fault

def selftest():
    "Seed each fault into a good page: the good one is silent, each bad one is named"
    site,text = 'https://here.io/lib',lambda *l: '\n'.join(l)
    md = lambda s: dict(cell_type='markdown', source=s)
    code = lambda s,**data: dict(cell_type='code', source=s, outputs=[dict(output_type='display_data', data=data)] if data else [])
    good = dict(cells=[md('# T\n\n> s'), md('A bird with parts.'), code('#| fig-alt: "a bird"\nx', **{'image/png':'AA'})])
    seeds = {'title cell': (dict(cells=[md('# T\n\n> s\n\nLost words.')]), good), 'lost prose': (dict(cells=[*good['cells'], md('And more.')]), good)}
    for said,cell in (('by its address', code('x', **{'text/markdown':'<typer.models.OptionInfo object at 0x7f1>'})),
                      ('within a signature', code('x', **{'text/markdown':text('```python', 'def f(a, # [`B`](http://x.y)', '```')})),
                      ('absolute link', md(f'[`B`]({site}/a.html#b)')), ('not there', md('See [`B`](page.html#b).')),
                      ('no valid HTML', code('x', **{'text/html':'<style scoped></style><table><tr><td>1</td></tr></table>'})),
                      ('no valid HTML', code('x', **{'text/html':'<table><tr><th></th><th>a</th></tr></table>'})),
                      ('without a text', code('x', **{'image/png':'AA'})),
                      ('without a text', md('![](a.png)')), ('without a text', code('x', **{'text/html':'<img src="a.png">'}))):
        seeds[f'{said} {len(seeds)}'] = (good, dict(cells=[*good['cells'], cell]))
    assert faults(good, good, site) == [], faults(good, good, site)
    for said,(source,page) in seeds.items():
        got = faults(source, page, site)
        assert len(got) == 1 and said.rstrip('0123456789 ') in got[0], (said, got)
    tree = [dict(section='S', contents=['a.ipynb', dict(section='T', contents=['b.ipynb'])])]
    assert list(unreached(['a.ipynb','b.ipynb'], ['a.ipynb','b.ipynb'], tree)) == []
    missed = list(unreached(['a.ipynb','b.ipynb','c.ipynb'], ['a.ipynb','c.ipynb'], tree))
    assert missed == ['b.ipynb: not prepared','c.ipynb: not in the sidebar'], missed
    assert valid('<th>a</th><th class="blank">&nbsp;</th>') == '<th>a</th><td class="blank"></td>'
    bad = dict(cells=[md(f'See [`B`]({site}/a/b.html#c).'), code('x', **{'image/png':'AA'}), code('x', **{'text/markdown':text('```python', f'def f(a, # [`B`]({site}/b.html)', '```')})])
    there = {'a/b.html':{'c'}, 'a/page.html':set()}
    mended = mend(copy.deepcopy(bad), 'a/page.ipynb', site, there)
    silent = faults(dict(cells=[]), mended, site, 'a/page.ipynb', there)
    assert silent == [] and len(faults(dict(cells=[]), bad, site)) == 4, (silent, faults(dict(cells=[]), bad, site))
    assert unlinked('A [`_b`](b.html#_b), a [`c`](b.html#c).', 'a/page.ipynb', there) == 'A `_b`, a [`c`](b.html#c).'
    assert [slug(h) for h in ('LinearSVM.fit_l1', '`evaluate`', '1. What it *is*', 'From [`a`](b.html)')] == ['linearsvm.fit_l1','evaluate','what-it-is','from-a']
    assert 'b.html#c' in mended['cells'][0]['source'] and 'def f(a, # B' in mended['cells'][2]['outputs'][0]['data']['text/markdown']
    assert last_sentence('First. See [the `bird`](x.ipynb):') == 'See the bird'
    for said in [*(s.rstrip('0123456789 ') for s in seeds), *(m.split(': ')[1] for m in missed)]: print('seen on a seeded fault:', said)
    print(f'{len(seeds) + len(missed)} seeded faults seen')

# Making

def prepare():
    "Write nbs/nbdev.yml, nbs/sidebar.yml and _proc; a notebook that cannot be prepared is shown with its first error"
    import yaml
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    (ROOT/'nbs'/'sidebar.yml').write_text(yaml.safe_dump(sidebar(ROOT/'nbs'), sort_keys=False))
    try: proc_nbs(n_workers=0, force=True)
    except Exception as e:
        first = re.search(r'^\w+(?:Error|Exception): .*', str(e.__cause__), re.MULTILINE)
        sys.exit(f"{e}\n{first[0] if first else ''}")

def render():
    "Let Quarto turn _proc into the site"
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=ROOT/'_proc', check=True)
    shutil.rmtree(ROOT/'_docs', ignore_errors=True)
    shutil.move(ROOT/'_proc'/'_docs', ROOT/'_docs')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name,said in (('render','run Quarto too'), ('check','check _proc as it is'), ('selftest','see that each check sees its fault')):
        parser.add_argument(f'--{name}', action='store_true', help=said)
    args = parser.parse_args()
    if args.render and not shutil.which('quarto'):
        sys.exit('quarto: not found; type `pip install quarto-cli`, or install it from https://quarto.org/docs/get-started, then run "make docs" again')
    os.chdir(ROOT)
    os.environ['PYTHONWARNINGS'] = 'ignore'
    warnings.simplefilter('ignore')
    selftest()
    if args.selftest: return
    if not args.check: prepare()
    if bad := list(each_page(None if args.check else mend)): sys.exit('\n'.join(bad))
    if args.render: render()

if __name__ == '__main__':
    try: main()
    except SystemExit as e:
        if e.code: print(e.code, file=sys.stderr)
        sys.stdout.flush()
        os._exit(bool(e.code))
    sys.stdout.flush()
    os._exit(0) # nbdev keeps a shell for each notebook, and IPython would tidy up each of them now: as long as the work itself
