"Hand in mutated images, archives, tables, checkpoints, words: `python tools/fuzz.py [--examples 200] [--only images]`"
import argparse, io, json, shutil, sys, tarfile, tempfile, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np, pandas as pd, torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from interp_parts.classification_specific_parts.files import read_features
from interp_parts.command.cli import run_command
from interp_parts.command.settings import check_settings, make_settings, settings_defaults
from interp_parts.command.train import train_run
from interp_parts.contrastive_reconstruction.published import import_original
from interp_parts.core import InterpPartsError
from interp_parts.data.download import extract
from interp_parts.data.images import broken, image_size, load_image
from interp_parts.data.loaders import PartBatches
from interp_parts.data.readers.file_lists import read_part_locs
from interp_parts.data.readers.files import DataFolder, read_list, read_mat
from interp_parts.data.readers.tables import read_table
from interp_parts.files import load_tensors, read_json
from interp_parts.models.backbones import Backbone
from interp_parts.testing.bad_inputs import Case, encoded_image, refused, zip_bytes
from interp_parts.testing.bad_runs import run_settings, small_run
from interp_parts.training.runs import load_run
from interp_parts.visual_words.base import read_attention

@st.composite
def mutated(draw, seeds):
    "One of some byte strings, cut, flipped, joined or with a piece replaced, up to four times"
    b = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        i,j = sorted(draw(st.tuples(*[st.integers(0, len(b))]*2)))
        how = draw(st.sampled_from(['flip','cut','drop','insert','number','repeat','join']))
        if how == 'flip' and i < len(b): b[i] ^= draw(st.integers(1, 255))
        elif how == 'cut': del b[j:]
        elif how == 'drop': del b[i:min(j, i+9)]
        elif how == 'insert': b[i:i] = draw(st.binary(max_size=8))
        elif how == 'number': b[i:i+4] = draw(st.sampled_from([b'\xff'*4, bytes(4), b'\x7f\xff\xff\xff',
                                                               b'\0\0\0\x80']))[:len(b)-i]
        elif how == 'repeat': b[i:i] = b[i:min(j, i+64)]
        else: b += draw(st.sampled_from(seeds))[:99]
    return bytes(b)

cells = st.one_of(st.sampled_from(['', ' ', 'nan', 'inf', '-1', '0', '1', '2.5', '1e999', '99999999999999999999',
                                   'null', '[]', '{}', '[0,0',
                                   '[0,0,9,9]', '[1,NaN,3,4]', '{"a": 1}', '{"a": [1,2]}', '[[1,2,1]]', '[[1]]',
                                   'true', 'train', 'test', 'a.png',
                                   '../a.png', '/etc/hostname', 'bad.csv', '\0', '"', '[[[[', '"x"', '[1,0]', '[0,1]',
                                   '{"a":{"b":1}}', '[null]']),
                  st.text(max_size=6))
columns = ('image split label labels identity box box_x box_y box_w box_h '
           'keypoints beak_x beak_y beak_visible mask').split()

@st.composite
def tables(draw):
    "A CSV file of known columns and odd cells; most images are there"
    cols = draw(st.lists(st.sampled_from(columns[1:]), unique=True, max_size=5))
    good = dict(split=['train','test'], image=['a.png','b.png'])
    right = lambda c,i: st.just(good[c][i%2]) if c in good else cells
    cell = lambda c,i: draw(st.one_of(right(c, i), right(c, i), cells))
    rows = [[cell(c, i) for c in ['image',*cols]] for i in range(draw(st.integers(0, 4)))]
    return pd.DataFrame(rows, columns=['image',*cols]).to_csv(index=False).encode('utf-8', 'replace')

typed = [w for ws,_ in refused['argument']().values() for w in ws if w not in ('synthesize','.')]
words = st.one_of(st.sampled_from(typed + [
    '--help', '--set', '--set=a', 'lr=[1,', 'lr=nan', 'coeff=x', 'data.valid=2', '--config', '--size', '-1',
    '99999999999', '--init', '--weights',
    '--n', '--seed', '--path', '--split', 'classifier', 'visual_words', 'table', 'cub', 'features', 'visualize',
    'predict', '--', '-x']),
    st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=8))

heads = [['train','classifier'], ['train','visual_words'],
         *[[w] for w in 'evaluate visualize predict features recipes no'.split()]]
values = st.one_of(st.none(), st.booleans(), st.integers(-2, 99), st.floats(), st.text(max_size=5),
                   st.sampled_from([10**30, 'cpu', 'skip', 'resnet18']),
                   st.lists(st.floats(0, 1), max_size=3),
                   st.dictionaries(st.sampled_from(['lr','clip','coeff','options','x']), st.floats(), max_size=2))
keys = [*settings_defaults, *'lr schedule optimizer clip weight_decay momentum betas coeff pad'.split()]
configs = st.dictionaries(st.sampled_from(keys), values, max_size=4).map(lambda c: json.dumps(c).encode())

def tgz_bytes(
    *members, # Pairs of a name and bytes
)->bytes:
    "A .tgz archive"
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w:gz') as t:
        for name,data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return f.getvalue()

def targets(
    run, # From `small_run`
    sandbox, # Folder for everything
)->dict:
    "Strategy and function by name"
    d,out = Path(sandbox),io.StringIO
    for f in ('images','archives','tables','runs','files'): (d/f).mkdir(exist_ok=True)
    for n,w in (('a.png',48),('b.png',50)): (d/'tables'/n).write_bytes(encoded_image('PNG', (w,40)))
    names = ('bad.csv','x.png','run','a','f.npz','a.npy','x.mat','x.txt','x.pth','x.safetensors')
    def put(name, data): (d/name).parent.mkdir(exist_ok=True); (d/name).write_bytes(data); return d/name
    put('tables/bad.csv', b''); put('images/x.png', b'')

    def image(data):
        f = put('images/x.png', data); broken(f)
        try: size = image_size(f)
        except InterpPartsError: size = None
        im = load_image(f)
        assert im.mode == 'RGB' and size == im.size, (im.mode, im.size, size)
    def archive(data):
        f = put('archives/x', data); t = d/'archives'/'target'
        try: extract(f, t, max_bytes=10**6, max_files=50); made = True
        except InterpPartsError: made = False; raise
        finally:
            assert made or not t.exists()
            assert all(not p.is_symlink() for p in t.rglob('*'))
            shutil.rmtree(t, ignore_errors=True)
    def table(data):
        df = read_table(put('tables/bad.csv', data))
        assert {'image','split'} <= set(df) and len(df)
        for x,b in PartBatches(df, 16): assert x.isfinite().all()
    copied = d/'runs'/'copy'
    def checkpoint(item):
        file,data = item
        shutil.rmtree(copied, ignore_errors=True); shutil.copytree(run, copied)
        (copied/file).write_bytes(data)
        try:
            if not file.startswith('state'): return check_load(load_run(copied))
            (copied/'model.safetensors').unlink()
            with redirect_stdout(out()): train_run('classifier', copied, run_settings(copied), resume=True,
                                                   say=lambda *a: None)
        finally: shutil.rmtree(copied, ignore_errors=True)
    def check_load(learn): assert all(v.shape == w.shape for v,w in zip(learn.model.state_dict().values(), weights()))
    def weights(): return list(kept.model.state_dict().values())
    kept = load_run(run)
    def whole(data):
        f,before = put('files/x.safetensors', data),[v.clone() for v in weights()]
        try: load_tensors(f, kept.model)
        except InterpPartsError:
            assert all(torch.equal(a, b) for a,b in zip(before, weights())); raise
        load_tensors(Path(run)/'model.safetensors', kept.model)
    rows = pd.DataFrame(dict(image=['a','b']))
    readers = {'f.npz':read_features, 'a.npy':lambda f: read_attention(f, rows), 'x.mat':read_mat,
               'x.pth':lambda f: import_original(f, d/'made'),
               'x.txt':lambda f: [tried(g, f) for g in (read_list, DataFolder('.').names, read_part_locs)],
               'x.w':lambda f: Backbone('test_resnet', weights=f)}
    def tried(g, f):
        try: g(f)
        except InterpPartsError as e: assert '\n' not in str(e)
    for n in readers: put(f'files/{n}', b'')
    put('files/x.safetensors', b'')
    def command(item):
        head,ws = item
        end = ['--out',str(d/'out'),'--data','folder','--path',str(d/'none')]*(head[0] == 'train')
        err = out()
        with redirect_stderr(err), redirect_stdout(out()): code = run_command([*head, *ws, *end])
        lines = [l for l in err.getvalue().splitlines() if ': warning: ' not in l]
        assert code in (0,2) and len(lines) == (code == 2), (code, lines)
        if code: raise InterpPartsError(lines[0])
    def setting(data):
        s = make_settings('region_grouping', config=read_json(put('files/s.json', data)),
                          options=dict(data='folder', path='.'))
        check_settings(s)
    evil = refused['pickle'](d/'it-ran')
    kinds = 'model.safetensors config.json state/state.json state/loop-1.pt state/model-1.safetensors'
    state = {f:(Path(run)/f).read_bytes() for f in kinds.split()}
    pick = lambda m: [v for v,_ in m.values() if isinstance(v, bytes)]
    npz = io.BytesIO(); np.savez(npz, **{'train/features':np.ones((2,3,4)), 'train/labels':np.zeros(2)})
    npy = io.BytesIO(); np.save(npy, np.ones((2,4,4), 'float32')/2)
    pth = io.BytesIO(); torch.save(dict(model_state_dict={'a':torch.ones(2)}), pth)
    mat = b'MATLAB 5.0 MAT-file'.ljust(124) + b'\0\1IM' + np.array([14,56, 6,8,6,0, 5,8,1,1, 65537,97, 9,8,0,0],
                                                                   '<i4').tobytes()
    seeds = {'f.npz':[npz.getvalue()], 'a.npy':[npy.getvalue()], 'x.mat':[mat], 'x.pth':[pth.getvalue()],
             'x.txt':[b'1 5 6 1\n2 7 8 1\n', b'2\nA B\n1 5 6\n2 7 8\n', b'a 1 0 0 5 5\n'],
             'x.w':[state['model.safetensors']]}
    kinds = ('PNG','JPEG','GIF','BMP','WEBP','TIFF','PPM')
    good = [encoded_image(k) for k in kinds] + [encoded_image('PNG', (1,1))]
    return dict(
        images=(mutated(good + pick(refused['image']())), image),
        archives=(mutated([tgz_bytes(('a/b', b'x'*99)), zip_bytes(('a/b', b'x'*99)),
                           *[b for b in pick(refused['archive']()) if len(b) < 9999]]), archive),
        tables=(st.one_of(tables(), mutated([t.encode() for t,_ in refused['table']().values() if isinstance(t, str)])),
                table),
        checkpoints=(st.sampled_from(sorted(state)).flatmap(lambda f: st.tuples(st.just(f),
                                                                                mutated([state[f], *evil.values()]))),
                                                                                checkpoint),
        weights=(mutated([state['model.safetensors']]), whole),
        files=(st.sampled_from(sorted(readers)).flatmap(lambda f: st.tuples(st.just(f),
                                                                            mutated([*seeds[f], *evil.values()]))),
               lambda item: readers[item[0]](put(f'files/{item[0]}', item[1]))),
        settings=(st.one_of(configs, mutated([t.encode() for t,_ in refused['setting']().values()])), setting),
        arguments=(st.tuples(st.sampled_from(heads), st.lists(words, max_size=6)), command))

def attack(
    strategy, # Of hypothesis
    use, # Function that takes what it makes
    examples:int, # How many
    sandbox, # Folder in which no file may appear
)->dict:
    "How many were refused and accepted, and the smallest one that did something else"
    said = []
    @settings(max_examples=examples, database=None, deadline=None, derandomize=True, print_blob=False,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    @given(strategy)
    def test(item): said.append(Case('fuzz', 'any', lambda: use(item)).survives(sandbox))
    start,failure = time.time(),''
    try: test()
    except BaseException as e: failure = f'{type(e).__name__}: {e} {getattr(e, "__notes__", "")}'[:2000]
    return dict(examples=len(said), refused=sum(s is not None for s in said), accepted=sum(s is None for s in said),
                seconds=round(time.time()-start), failure=failure)

def campaign(
    examples:int=200, # Of each target
    run=None, # From `small_run`; None: one is made
    sandbox=None, # Folder for everything; None: a new one
    only=None, # Names of targets; None: all
)->pd.DataFrame:
    "One row a target"
    sandbox = Path(sandbox or tempfile.mkdtemp())
    run = run or small_run(sandbox/'small')
    for f in ('files/s.json','archives/x'): (sandbox/f).parent.mkdir(parents=True, exist_ok=True); (sandbox/f).touch()
    todo = {k:v for k,v in targets(run, sandbox).items() if not only or k in only}
    res = pd.DataFrame([dict(target=k, **attack(*v, examples, sandbox)) for k,v in todo.items()]).set_index('target')
    assert not (sandbox/'it-ran').exists(), 'a pickle ran'
    return res

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--examples', type=int, default=200, help='of each target')
    parser.add_argument('--only', nargs='*', help='names of targets')
    args = parser.parse_args()
    res = campaign(args.examples, only=args.only)
    print(res.drop(columns='failure').to_string())
    for k,f in res.failure.items():
        if f: print(f'\nFAIL {k}\n{f}')
    sys.exit((res.failure != '').any())

if __name__ == '__main__': main()
