"""Parts of real birds on a frozen network, from class labels alone: `python tools/frozen_parts.py CUB_40 WEIGHTS --cache DIR --out FILE.csv`

A trial that `part_discovery` does not offer yet: a foreground that class labels teach, clusters of place and feature within it,
and a small head that learns these clusters; the last two steps are repeated, each time with the head's foreground.
"""
import argparse, csv, time, warnings
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

from interp_parts.core import Batch, Parts
from interp_parts.data.loaders import PartBatches
from interp_parts.data.readers.registry import read_data
from interp_parts.evaluation.parts import evaluate_parts
from interp_parts.models.backbones import Backbone, backbone_stats
from interp_parts.part_discovery.losses import background_loss, entropy_loss, total_variation
from interp_parts.part_discovery.places import PlacedParts

NET,SIZE,K = 'tf_efficientnet_lite0',224,8
VIEWS = 'plain','flip'

# Features: the last map (1280 channels) and that of the last block at stride 16 (112), both 14x14, of an image and its mirror image

@torch.no_grad()
def features(df, split, weights, cache):
    "Maps of a split by view and level, as files of half precision; and its batches"
    net = Backbone(NET, 16, 'final', weights=weights).eval().to(memory_format=torch.channels_last)
    fine = []
    net.net.blocks[4].register_forward_hook(lambda m,i,o: fine.append(o))
    rows = df[df.split==split].copy()
    rows.attrs = df.attrs
    files = {(v,l):cache/f'{split}_{v}_{l}.npy' for v in VIEWS for l in ('final','s16')}
    batches = []
    found = {k:[] for k in files}
    whole = all(f.exists() for f in files.values())
    for x,b in PartBatches(rows, SIZE, 'squash', bs=20, whole=False, stats=backbone_stats(NET)):
        batches.append(b)
        for v in VIEWS*(not whole):
            fine.clear()
            seen = (x.flip(-1) if v == 'flip' else x).contiguous(memory_format=torch.channels_last)
            with torch.autocast('cpu', torch.bfloat16): last = net(seen)
            for l,m in (('final',last), ('s16',fine[0])): found[v,l].append(m.float().half().contiguous().numpy())
    if not whole:
        for k,f in files.items(): np.save(f, np.concatenate(found[k]))
    return {k:np.load(f, mmap_mode='r') for k,f in files.items()},Batch.cat(batches)

class Levels:
    "Standardised maps of one split: `fine` (112 channels), `both` (256 directions of the last map, and those)"
    def __init__(self, store, made=None):
        self.store = store
        self.made = made or self._fit()
        self.kept = {k:self._turned(*k) for k in store}

    def _tokens(self, v, l, at): return torch.from_numpy(np.asarray(self.store[v,l][at], dtype=np.float32)).flatten(2).transpose(1,2)

    def _fit(self):
        n = len(self.store['plain','s16'])
        at = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:200].sort().values.numpy()
        made = {}
        for l,keep in (('final',256), ('s16',112)):
            x = self._tokens('plain', l, at).flatten(0,1)
            mean,scale = x.mean(0),x.std(0) + 1e-4
            z = (x-mean)/scale
            made[l] = mean,scale,torch.linalg.eigh((z.T@z).double()).eigenvectors[:,-keep:].flip(1).float()
        return made

    def _turned(self, v, l):
        mean,scale,turn = self.made[l]
        n = len(self.store[v,l])
        return torch.cat([((self._tokens(v, l, slice(i,i+50)) - mean)/scale@turn).half() for i in range(0, n, 50)])

    def map(self, v, l, at): return self.kept[v,l][at].float().transpose(1,2).unflatten(2, (14,14))
    def both(self, v, at): return torch.cat([self.map(v, 'final', at), self.map(v, 's16', at)], 1)
    def mirrored(self, at): return (self.map('plain', 's16', at) + self.map('flip', 's16', at).flip(-1))/2
    def __len__(self): return len(self.store['plain','s16'])

def _steps(opt, rates, epochs, n, bs=32):
    "Batches of row numbers, with a step of the schedule after each"
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, rates, total_steps=epochs*(n//bs), cycle_momentum=False)
    for _ in range(epochs):
        p = torch.randperm(n)
        for i in range(n//bs):
            yield p[i*bs:(i+1)*bs]
            plan.step()

def _step(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()

# 1. A foreground that the classes teach

def foreground(x, y, seed, epochs=8, lr=3e-2):
    "Share (n,14,14) of each cell in the foreground: one linear unit, whose weighted mean has to tell the class"
    torch.manual_seed(seed)
    unit,head,norm = nn.Conv2d(368, 1, 1),nn.Linear(256, int(y.max())+1),nn.BatchNorm1d(256, affine=False)
    nn.init.zeros_(unit.weight)
    nn.init.zeros_(unit.bias)
    on = lambda v,j: unit(x.both(v, j)).sigmoid()[:,0]
    opt = torch.optim.AdamW([dict(params=unit.parameters(), lr=lr/2), dict(params=head.parameters(), lr=lr)], weight_decay=1e-2)
    for j in _steps(opt, [lr/2,lr], epochs, len(x)):
        v,u = VIEWS if torch.rand(()) < .5 else VIEWS[::-1]
        a,b = on(v, j),on(u, j)
        mean = norm((x.map(v, 'final', j)*a[:,None]).sum((2,3))/(a.sum((1,2))[:,None] + 2))
        two = torch.stack([a, 1-a], 1)
        loss = F.cross_entropy(head(F.dropout(mean, .5)), y[j]) + 1.5*a.mean() + background_loss(1-a)
        _step(opt, loss + .5*total_variation(two) + .05*entropy_loss(two) + 3*(a - b.flip(-1)).square().mean())
    with torch.no_grad(): a = torch.cat([on('plain', j) for j in torch.arange(len(x)).split(100)])
    return (a/a.flatten(1).quantile(.95, 1)[:,None,None]).clamp(0, 1)

# 2. Clusters of place and feature within the foreground

def _places(w):
    "Places (n,2,h,w) of the cells in the object's own frame, in spreads"
    return PlacedParts(1, kind=0.).described(torch.stack([w, 1-w], 1))[:,:2]

class ObjectClusters:
    "K clusters of place and feature; left and right change places where that fits better"
    def __init__(self, like=1., sharp=8., directions=32, place=1.):
        self.like,self.sharp,self.directions,self.place,self.turn = like,sharp,directions,place,None

    def described(self, f, w):
        g = f - (f*w[:,None]).sum((2,3), keepdim=True)/w.sum((1,2)).clamp_min(1e-6)[:,None,None,None]
        if self.turn is None:
            z = self._rows(g, w)
            values,v = torch.linalg.eigh((z.T@z).double()/len(z))
            self.turn = v[:,-self.directions:].float()*(2/values[-self.directions:].sum()).sqrt().float()
        return torch.cat([self.place*_places(w), self.like*torch.einsum('bdhw,de->behw', g, self.turn)], 1)

    def _rows(self, x, w): return x.permute(0,2,3,1).flatten(0,2)[w.flatten() > .3]

    def nearest(self, x, w):
        "Squared distances (n,K,h,w) in the better way, and which images look the other way"
        c = self.centres
        far = lambda x: x.square().sum(1, keepdim=True) - 2*torch.einsum('kd,bdhw->bkhw', c, x) + c.square().sum(1)[:,None,None]
        one,other = far(x),far(torch.cat([-x[:,:1], x[:,1:]], 1))
        cost = lambda d: (d.min(1).values*w).sum((1,2))
        turned = (cost(other) < cost(one))[:,None,None,None]
        return torch.where(turned, other, one),turned

    def fit(self, f, w, seed, turns=10):
        x,n = self.described(f, w),len(f)//8
        means = lambda rows,**kw: torch.from_numpy(KMeans(K, n_init=1, **kw).fit(rows.numpy()).cluster_centers_)
        self.centres = means(self._rows(x[:n], w[:n]), max_iter=3, random_state=seed)
        for t in range(turns):
            _,turned = self.nearest(x, w)
            rows = self._rows(torch.where(turned, torch.cat([-x[:,:1], x[:,1:]], 1), x), w)
            self.centres = means(rows, init=self.centres.numpy(), max_iter=50 if t == turns-1 else 3)
        return self

    def maps(self, f, w):
        d,_ = self.nearest(self.described(f, w), w)
        return torch.cat([w[:,None]*(-self.sharp*d).softmax(1), 1-w[:,None]], 1)

# 3. A head that finds the same parts in the features

class Head(nn.Module):
    def __init__(self, channels=368, width=96):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(channels, affine=False), nn.Dropout2d(.2), nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width),
                                 nn.GELU(), nn.Conv2d(width, width, 3, padding=1, padding_mode='replicate'), nn.BatchNorm2d(width), nn.GELU(),
                                 nn.Conv2d(width, K+1, 1))
    def forward(self, x): return self.net(x).softmax(1)

def taught(x, target, seed, epochs=4, lr=3e-3):
    "A head that was taught maps (n,K+1,14,14)"
    torch.manual_seed(seed)
    head = Head()
    opt = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=1e-2)
    for j in _steps(opt, [lr], epochs, len(x)):
        flip = torch.rand(()) < .5
        t = target[j].flip(-1) if flip else target[j]
        _step(opt, -(t*head(x.both(VIEWS[int(flip)], j)).clamp_min(1e-6).log()).sum(1).mean())
    return head.eval()

@torch.no_grad()
def found(head, x, v='plain', power=1):
    "The head's maps (n,K+1,14,14), sharpened"
    m = torch.cat([head(x.both(v, j)) for j in torch.arange(len(x)).split(100)])**power
    return m/m.sum(1, keepdim=True)

# 4. Votes of the parts

def pooled(x, v, maps, floor=.01):
    "Mean features (n,K,1280) of the parts"
    out = []
    for j in torch.arange(len(x)).split(50):
        f = torch.from_numpy(np.asarray(x.store[v,'final'][j.numpy()], dtype=np.float32)).flatten(2)
        m = maps[j,:K].flatten(2)
        out.append(m@f.transpose(1,2)/(m.sum(2, keepdim=True) + floor*196))
    return torch.cat(out)

def accuracy(train, test, y, yt, seed, epochs=30, lr=5e-4):
    "Share of right answers; `train` are vectors (2,n,K,D) of both views, and the answer is the mean of the parts' votes"
    torch.manual_seed(seed)
    mean,scale = train.mean((0,1)),train.flatten(0,2).std(0)
    train,test = (train-mean)/scale,(test-mean)/scale
    weight,head = nn.Parameter(torch.ones(K, train.shape[3])),nn.Linear(train.shape[3], int(y.max())+1, bias=False)
    nn.init.zeros_(head.weight)
    opt = torch.optim.AdamW([dict(params=[weight], lr=20*lr, weight_decay=0.), dict(params=head.parameters(), lr=lr)], weight_decay=.3)
    for j in _steps(opt, [20*lr,lr], epochs, len(y)):
        v = torch.where(torch.rand(len(j),1,1) < .5, train[1,j], train[0,j])*weight
        v = F.dropout(v, .5)*(torch.rand(len(j), K, 1) >= .3)/.7
        _step(opt, F.cross_entropy(head(v).mean(1), y[j], label_smoothing=.1))
    return (head(test*weight).mean(1).argmax(1) == yt).float().mean().item()

# Scores

def scores(maps, batches, attrs):
    "Keypoint numbers of maps of the training and the test images"
    def stream(m, b):
        for j in torch.arange(len(m)).split(50): yield Parts(m[j], m[j].amax((2,3)), background=K),b[j]
    names = ('keypoint_error','nmi','ari','fg_nmi','fg_ari')
    r = evaluate_parts(stream(maps[0], batches[0]), stream(maps[1], batches[1]), attrs)
    return {k+e:r[k+e] for e in ('','_strips','_xy_kmeans','_constant_parts') for k in names if k+e in r}

def in_box(b):
    "1 in the cells (n,14,14) of the boxes, almost 0 elsewhere"
    g = (torch.arange(14)+.5)/14*SIZE
    inside = lambda at,side: (g >= b.box[:,at:at+1]) & (g <= b.box[:,at:at+1] + b.box[:,side:side+1])
    return (inside(1, 3)[:,:,None] & inside(0, 2)[:,None]).float()*.98 + .01

def trial(seed, x, batches, attrs, rounds=4, fit=400):
    "Parts of one seed: scores of the first clusters and of the head"
    y,yt = (b.label for b in batches)
    tr,te = x
    w = foreground(tr, y, seed)
    some = torch.randperm(len(tr), generator=torch.Generator().manual_seed(seed))[:fit]
    for _ in range(rounds):
        clusters = ObjectClusters().fit(tr.mirrored(some), w[some], seed)
        head = taught(tr, torch.cat([clusters.maps(tr.mirrored(j), w[j]) for j in torch.arange(len(tr)).split(100)]), seed)
        w = 1 - (found(head, tr)[:,-1] + found(head, tr, 'flip')[:,-1].flip(-1))/2
    maps = [found(head, v, power=2) for v in x]
    votes = [torch.stack([pooled(tr, 'plain', maps[0]), pooled(tr, 'flip', found(head, tr, 'flip', 2))]), pooled(te, 'plain', maps[1])]
    return dict(scores(maps, batches, attrs), accuracy=accuracy(*votes, y, yt, seed))

def baseline(seed, x, batches, attrs):
    "k-means of the features alone, centred in the true box, mirror images averaged"
    w = [in_box(b) for b in batches]
    some = torch.randperm(len(x[0]), generator=torch.Generator().manual_seed(seed))[:400]
    c = ObjectClusters(place=0.).fit(x[0].mirrored(some), w[0][some], seed)
    made = [torch.cat([c.maps(v.mirrored(j), u[j]) for j in torch.arange(len(v)).split(100)]) for v,u in zip(x, w)]
    return scores(made, batches, attrs)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('path')
    p.add_argument('weights')
    p.add_argument('--cache', type=Path, default=Path('features'))
    p.add_argument('--out', type=Path, default=Path('frozen_parts.csv'))
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    a = p.parse_args()
    warnings.simplefilter('ignore')
    a.cache.mkdir(parents=True, exist_ok=True)
    df = read_data('cub', a.path)
    (train,bt),(test,be) = (features(df, s, a.weights, a.cache) for s in ('train','test'))
    first = Levels(train)
    x,batches = (first, Levels(test, first.made)),(bt,be)
    done = {(r['what'],r['seed']) for r in csv.DictReader(a.out.open())} if a.out.exists() else set()
    for seed in a.seeds:
        for what,run in (('parts of a frozen network',trial), ('k-means of its features in the true box',baseline)):
            if (what,str(seed)) in done: continue
            t = time.process_time()
            for k,v in {**run(seed, x, batches, df.attrs), 'cpu_seconds':time.process_time()-t}.items():
                new = not a.out.exists()
                with a.out.open('a', newline='') as f:
                    if new: f.write('what,seed,measure,value\n')
                    csv.writer(f, lineterminator='\n').writerow([what, seed, k, f'{v:.4f}'])
                print(what, seed, k, f'{v:.4f}', flush=True)

if __name__ == '__main__': main()
