"""Taught parts of real birds on several frozen networks: `python tools/frozen_networks.py CUB_40 --network mobilenetv2_100 --weights FILE --cache DIR --out FILE.csv`

What `part_discovery --recipe frozen_birds_p8` does, without its command: features of each image and of its mirror image are computed once, in bfloat16, for all seeds.
`--held-out` trains on the first 20 training images of each class and scores the others: settings are chosen so.
"""
import argparse, csv, time, warnings
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F
from torch import nn

from frozen_parts import ObjectClusters, in_box
from interp_parts.core import Batch, Parts
from interp_parts.data.loaders import PartBatches
from interp_parts.data.readers.registry import read_data
from interp_parts.evaluation.parts import evaluate_parts
from interp_parts.models.backbones import backbone_stats
from interp_parts.part_discovery.features import part_features
from interp_parts.part_discovery.taught import TaughtMaps

SIZE,K,FLOOR,GRID = 224,8,.01,(14,14)

@torch.no_grad()
def features(df, split, views, name, weights, cache):
    "Maps (views,N,C,14,14) of half precision, a batch of all annotations, and the channels of the finer stage"
    net = part_features(name, 16, 2, 'none', final=True, weights=weights).eval().to(memory_format=torch.channels_last)
    rows = df[df.split==split].copy()
    rows.attrs = df.attrs
    files = [cache/f'{name}_{Path(weights).stem}_{split}_{v}.npy' for v in range(views)]
    lost = [v for v,f in enumerate(files) if not f.exists()]
    found,batches = {v:[] for v in lost},[]
    for x,b in PartBatches(rows, SIZE, 'squash', bs=20, whole=False, stats=backbone_stats(name)):
        batches.append(b)
        for v in lost:
            seen = (x.flip(-1) if v else x).contiguous(memory_format=torch.channels_last)
            with torch.autocast('cpu', torch.bfloat16): found[v].append(net(seen).float().half().contiguous().numpy())
    for v in lost: np.save(files[v], np.concatenate(found[v]))
    return [np.load(f, mmap_mode='r') for f in files],Batch.cat(batches),net.fine

class Cells:
    "Standardised cells of all images, and the maps that are taught on those of the training images"
    def __init__(self, train, fine, some):
        x = torch.from_numpy(train[0][some].astype(np.float32)).flatten(2).transpose(1, 2).flatten(0, 1)
        self.mean,self.std = x.mean(0),(x.var(0) + 1e-5).sqrt()
        self.taught = TaughtMaps(x.shape[1], K, fine)
        self.taught.fit_directions((x - self.mean)/self.std)

    def scaled(self, m): return (torch.from_numpy(m.astype(np.float32)).flatten(2).transpose(1, 2) - self.mean)/self.std
    def turned(self, files): return torch.stack([torch.cat([(self.scaled(f[i:i+50])@self.taught.turn).half() for i in range(0, len(f), 50)]) for f in files])

    @torch.no_grad()
    def maps(self, tokens):
        "Part maps (N,K+1,14,14) of tokens (N,196,D)"
        return torch.cat([(self.taught.sharp*self.taught.net(t.float().transpose(1, 2).unflatten(2, GRID))).softmax(1) for t in tokens.split(50)])

    def pooled(self, file, maps, at):
        "Mean features (N,K,C) of the parts"
        out = []
        for j in torch.arange(len(at)).split(50):
            m = maps[j,:K].flatten(2)
            out.append(m@self.scaled(file[at[j].numpy()])/196/(m.mean(2, keepdim=True) + FLOOR))
        return torch.cat(out)

def votes(train, test, y, yt, seed, epochs=30, lr=5e-4):
    "Accuracy of the mean vote; `train` are vectors (2,N,P,D) of both views, of parts or of whole images (P is 1)"
    torch.manual_seed(seed)
    parts = train.shape[2]
    weight,head = nn.Parameter(torch.ones(train.shape[2:])),nn.Linear(train.shape[3], int(y.max())+1, bias=False)
    optimizer = torch.optim.AdamW([dict(params=[weight], lr=20*lr), dict(params=head.parameters(), lr=lr)], weight_decay=.3)
    per = len(y)//32
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, [20*lr,lr], total_steps=epochs*per+1, cycle_momentum=False)
    for step in range(epochs*per):
        if step%per == 0: order = torch.randperm(len(y))
        j = order[step%per*32:][:32]
        v = F.dropout(torch.where(torch.rand(len(j),1,1) < .5, train[1,j], train[0,j])*weight, .5)
        if parts > 1: v = v*(torch.rand(len(j), parts, 1) >= .3)/.7
        loss = F.cross_entropy(head(v).mean(1), y[j])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    with torch.no_grad(): return (head(test*weight).mean(1).argmax(1) == yt).float().mean().item()

def scores(maps, batches, attrs):
    "Keypoint numbers of maps of the training and the scored images"
    def stream(m, b):
        for j in torch.arange(len(m)).split(50): yield Parts(m[j], m[j].amax((2,3)), background=K),b[j]
    r = evaluate_parts(stream(maps[0], batches[0]), stream(maps[1], batches[1]), attrs)
    return {k:r[k] for k in ('keypoint_error','fg_nmi','fg_ari','fg_nmi_strips','fg_ari_strips')}

def clusters_in_box(cells, train, test, batches, seed):
    "Maps of k-means of the finer stage alone, centred in the true box, mirror images averaged"
    fine = cells.taught.first
    one = lambda tokens,i: tokens[i,:,fine:].float().transpose(1, 2).unflatten(2, GRID)
    mean = lambda tokens,i: (one(tokens[0], i) + one(tokens[1], i).flip(-1))/2
    w = [in_box(b) for b in batches]
    some = torch.randperm(train.shape[1], generator=torch.Generator().manual_seed(seed))[:400]
    made = ObjectClusters(place=0.).fit(mean(train, some), w[0][some], seed)
    return [torch.cat([made.maps(mean(t, j), u[j]) for j in torch.arange(len(u)).split(100)]) for t,u in zip((train,test), w)]

def held_out(y, n=20):
    "Rows of the first n images of each class, and of the others"
    rank = torch.zeros_like(y)
    for c in y.unique(): rank[y == c] = torch.arange((y == c).sum())
    return (rank < n).nonzero()[:,0],(rank >= n).nonzero()[:,0]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('path')
    for k in ('network','weights'): p.add_argument(f'--{k}', required=True)
    p.add_argument('--cache', type=Path, default=Path('features'))
    p.add_argument('--out', type=Path, default=Path('frozen_networks.csv'))
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--held-out', action='store_true')
    p.add_argument('--clusters', action='store_true', help='centred k-means of the finer stage in the true box instead')
    a = p.parse_args()
    warnings.simplefilter('ignore')
    a.cache.mkdir(parents=True, exist_ok=True)
    df = read_data('cub', a.path)
    train,b,fine = features(df, 'train', 2, a.network, a.weights, a.cache)
    at = torch.arange(len(b.label))
    if a.held_out:
        at,other = held_out(b.label)
        test,there,bt = train,other,b[other]
    else:
        test,bt,_ = features(df, 'test', 1 + a.clusters, a.network, a.weights, a.cache)
        there = torch.arange(len(bt.label))
    cells = Cells(train, fine, at[::4][:200].numpy())
    tokens,seen,y = cells.turned(train)[:,at],cells.turned(test[:1+a.clusters])[:,there],b.label[at]
    def put(seed, made):
        new = not a.out.exists()
        with a.out.open('a', newline='') as f:
            if new: f.write('network,images,seed,measure,value\n')
            for k,v in made.items(): csv.writer(f, lineterminator='\n').writerow([a.network, 'held out' if a.held_out else 'test', seed, k, f'{v:.4f}'])
        print(seed, {k:round(v, 4) for k,v in made.items()}, flush=True)
    for seed in a.seeds:
        started = time.process_time()
        if a.clusters:
            made = scores(clusters_in_box(cells, tokens, seen, (b[at],bt), seed), (b[at],bt), df.attrs)
            put(seed, {f'clusters_{k}':made[k] for k in ('keypoint_error','fg_nmi','fg_ari')})
            continue
        cells.taught.teach(tokens, y, GRID, len(df.attrs['classes']), seed=seed)
        maps,found = [cells.maps(t) for t in tokens],cells.maps(seen[0])
        vectors = torch.stack([cells.pooled(f, m, at) for f,m in zip(train, maps)])
        whole = lambda f,i: torch.cat([cells.scaled(f[j.numpy()]).mean(1, keepdim=True) for j in i.split(50)])
        made = scores([maps[0],found], (b[at],bt), df.attrs)
        made['accuracy'] = votes(vectors, cells.pooled(test[0], found, there), y, bt.label, seed)
        made['cpu_seconds'] = time.process_time()-started
        made['accuracy_plain'] = votes(torch.stack([whole(f, at) for f in train]), whole(test[0], there), y, bt.label, seed)
        put(seed, made)

if __name__ == '__main__': main()
