"Compare each method with numbers recorded from its original: `python tests/parity.py DIR [METHOD] [--selftest]`"
import argparse, importlib, re, sys, traceback
from pathlib import Path

import numpy as np, torch

METHODS = ('region_grouping', 'contrastive_reconstruction', 'visual_words', 'activation_diversity',
           'classification_specific_parts', 'part_discovery', 'nonparametric_prototypes')

def as_array(
    v, # Tensor, array, list or number
)->np.ndarray:
    "`v` for NumPy"
    return v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v)

def difference(
    ours:np.ndarray, # What our code gives
    theirs:np.ndarray, # What was recorded
)->float:
    "Largest absolute difference; for text and truth values the number of unlike elements; infinite if shapes differ"
    if ours.shape != theirs.shape: return np.inf
    if theirs.dtype.kind in 'USb': return np.count_nonzero(ours != theirs)
    return np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)

def shifted(
    a:np.ndarray, # A recorded output
    tol:float, # Its tolerance
)->np.ndarray:
    "The output moved by 3 tolerances; if it must be exact, its last element by one unit"
    if tol: return a.astype(np.float64) + 3*tol
    if a.dtype.kind in 'US': a = a.astype(f'U{a.itemsize+1}')
    a = a.astype(np.int64) if a.dtype.kind in 'iu' else a.copy()
    v = a.flat[-1]
    a.flat[-1] = f'{v}?' if a.dtype.kind == 'U' else not v if a.dtype == bool else \
        v+1 if a.dtype.kind == 'i' else np.nextafter(v, a.dtype.type(np.inf))
    return a

class Recording:
    "The arrays of one recorded file: inputs are read as `r[name]`, outputs are compared, and both are remembered"
    def __init__(self,
        path, # npz file
        selftest:bool=False, # Compare shifted outputs too?
    ):
        with np.load(path, allow_pickle=False) as z: self.arrays = dict(z)
        self.file,self.selftest,self.known = Path(path).stem,selftest,set()
        self.compared,self.failed,self.missed = 0,0,0

    def __contains__(self, name): return name in self.arrays

    def __getitem__(self, name):
        self.known.add(name)
        return self.arrays[name]

    def tensor(self, name): return torch.from_numpy(self[name].copy())

    def find(self, pattern):
        "What the group in `pattern` stands for, of every array it fits, in the order of the file"
        return [m[1] for name in self.arrays if (m := re.fullmatch(pattern, name))]

    def top(self, name): return np.abs(self.arrays[name].astype(np.float64)).max(initial=0)

    def near(self, name, ours, tol, at=...):
        "Compare the recorded output, or the elements `at` of it, with `ours`: absolute tolerance"
        self.known.add(name)
        theirs,ours,label = np.asarray(self.arrays[name][at]),as_array(ours),name if at is ... else f'{name}[{at}]'
        self.judge(label, tol, lambda shift: difference(ours, shifted(theirs, tol) if shift else theirs))

    def exact(self, name, ours, at=...): self.near(name, ours, 0, at)

    def close(self, name, ours, tol, least=0.):
        "Compare with a tolerance relative to the largest recorded value, but at least `least`"
        self.near(name, ours, max(tol*self.top(name), least))

    def judge(self, name, limit, off):
        "What `off(shift)` gives must be within the limit; the self-test shifts too, and then it must not be"
        delta = off(False)
        blind = self.selftest and off(True) <= limit
        word = ('ok' if delta <= limit else 'FAIL') + self.selftest*('  MISSED' if blind else '  seen')
        self.compared,self.failed,self.missed = self.compared+1,self.failed+(not delta <= limit),self.missed+blind
        print(f"{f'{self.file}/{name}':70} {delta:9.3g}  {limit:9.3g}  {word}")

    def fail(self, what):
        "Count a failure that is not a comparison"
        self.failed += 1
        print(f'{self.file}  {what}  FAIL')

    def run(self, piece):
        "Compare all outputs; an array that nothing reads is a failure, and so is an error"
        try: piece(self)
        except Exception as e:
            traceback.print_exc()
            self.fail(f'{type(e).__name__}: {e}'.splitlines()[0])
        for name in sorted(set(self.arrays) - self.known): self.fail(f'{name}: neither used nor compared')

def longest(
    name:str, # Of a file, or the rest of it
    known, # Names that it may start with
):
    "The longest of `known` that `name` is, or starts with before an underscore; None if there is none"
    return max((k for k in known if f'{name}_'.startswith(f'{k}_')), key=len, default=None)

def built():
    "Modules with the comparisons of the methods that we have: `parity_METHOD.py` beside this file"
    here = Path(__file__).parent
    return {m:importlib.import_module(f'parity_{m}') for m in METHODS if (here/f'parity_{m}.py').is_file()}

def compare(
    path:Path, # npz file
    modules:dict, # Of the methods
    selftest:bool=False, # Compare shifted outputs too?
)->tuple:
    "Compare one file; returns how many outputs were compared, how many failed, and how many shifts were missed"
    r,method = Recording(path, selftest),longest(path.stem, METHODS)
    piece = method and longest(path.stem[len(method)+1:], modules[method].pieces)
    if piece is None: r.fail('a file that is not known')
    else: r.run(modules[method].pieces[piece])
    return r.compared,r.failed,r.missed

def arguments(argv=None):
    "Folder, method and whether to test ourselves; exits with 2 if they cannot be used"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dir', metavar='DIR', type=Path, help='folder of METHOD_piece[_variant].npz')
    parser.add_argument('method', metavar='METHOD', nargs='?', choices=METHODS, help=', '.join(METHODS))
    parser.add_argument('--selftest', action='store_true', help='shift recorded outputs too: every one must fail')
    args = parser.parse_args(argv)
    if not args.dir.is_dir(): parser.error(f'{args.dir}: no such folder')
    return args

def main():
    args = arguments()
    modules,files = built(),sorted(args.dir.glob('*.npz'))
    if args.method: files = [f for f in files if longest(f.stem, METHODS) == args.method]
    later = [f for f in files if longest(f.stem, METHODS) in set(METHODS) - set(modules)]
    if later: print('not built yet:', ', '.join(dict.fromkeys(longest(f.stem, METHODS) for f in later)))
    counts = [compare(f, modules, args.selftest) for f in files if f not in later]
    compared,failed,missed = (sum(c) for c in zip(*counts)) if counts else (0,0,0)
    nothing = not compared and (args.method or not later)
    if nothing: print(f'nothing to compare in {args.dir}')
    if args.selftest: print(f'{compared} shifted, {compared-missed} seen, {missed} missed')
    print(f'{compared} compared, {failed} failed')
    sys.exit(bool(failed or missed or nothing))

if __name__ == '__main__': main()
