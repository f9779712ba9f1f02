"Visual words and ProtoPNet against the numbers of tests/fixtures/parity/visual_words.md, which documents them"
import copy, tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image
from torch import nn

from interp_parts.models.backbones import Backbone
from interp_parts.training.optim import split_params
from interp_parts.visual_words.base import BaseModel
from interp_parts.core import Batch, PartLearner
from interp_parts.data.images import imagenet_stats, normalize
from interp_parts.training.fit import fit_run
from interp_parts.visual_words.fidelity import AttentionFidelity
from interp_parts.visual_words.fields import ReceptiveField, activation_boxes
from interp_parts.visual_words.files import OriginalFiles
from interp_parts.visual_words.images import heat
from interp_parts.visual_words.layer import (attention_loss, log_similarity, nearest_words, weight_norm)
from interp_parts.visual_words.losses import WordLoss
from interp_parts.visual_words.maps import resize_maps, to_unit
from interp_parts.visual_words.network import VisualWords
from interp_parts.visual_words.projection import nearest_patches, project_words
from interp_parts.visual_words.training import WordPhases

class Stub(nn.Module):
    "The recordings' backbone: a convolution as wide as its stride, batch norm, ReLU"
    def __init__(self, conv):
        super().__init__()
        o,i,k,_ = conv.shape
        self.channels,self.conv,self.bn = o,nn.Conv2d(i, o, k, k, bias=False),nn.BatchNorm2d(o)

    def forward(self, x): return self.bn(self.conv(x)).relu()

def recorded(r, prefix):
    "The original's state under a prefix"
    return {k:r.tensor(f'{prefix}.{k}') for k in r.find(rf'{prefix}\.(.+)')}

def rebuilt(state):
    "Our model with the architecture and the numbers of the original's `state`"
    words,last = state['prototype_vectors'],state['last_layer.weight']
    kind = 'regular' if sum(k.endswith('weight') and k.startswith('add_on') for k in state) == 2 else 'bottleneck'
    stub = Stub(state['features.conv.weight'])
    net = VisualWords(len(last), len(words), depth=words.shape[1], add_on=kind, features=stub).to(words.dtype)
    net.load_original(state)
    return net

def head(r):
    "Forward passes, losses and gradients of both kinds of added layers"
    x,y,a = (r.tensor('x_u8').double()/255 - .5)/.25,r.tensor('y'),r.tensor('attn_u8').double()/255
    for kind in r.find(r'(\w+)\.eval\.logits'):
        state = recorded(r, f'{kind}.p')
        with torch.no_grad(): outputs(r, f'{kind}.eval', rebuilt(state).eval()(x))
        with torch.no_grad(): outputs(r, f'{kind}.train', rebuilt(state).train()(x))
        for case in r.find(rf'{kind}\.(.+)\.loss'): one_batch(r, f'{kind}.{case}', rebuilt(state).train(), x, y, a)

def outputs(r, stage, o):
    "What a forward pass gives; 1e-9 in float64"
    ours = dict(logits=o.logits, min_distances=o.distances.least, activations=o.activation, conv_features=o.z,
                patterns=log_similarity(o.distances.maps), distances=o.distances.maps)
    for k in r.find(rf'{stage}\.(\w+)'): r.close(f'{stage}.{k}', ours[k], 1e-9)

class Unmasked(WordLoss):
    "ProtoPNet with the absolute weights of all words"
    classes = None

def word_loss(case, k):
    "Our loss for a recorded case"
    if 'class_specific' in case: return (Unmasked if case.endswith('nomask') else WordLoss)(class_specific=True)
    return WordLoss(attend=0 if case.endswith('noattn') else 10., top=k, compat=True)

def one_batch(r, case, net, x, y, a):
    "Loss terms, logged numbers and gradients of a training batch"
    k,x = int(r[f'{case}.k']),x.clone().requires_grad_()
    o,loss = net(x),word_loss(case, k)
    loss.learn = SimpleNamespace(out=o, model=net, xb=(x,), yb=(y,), extra=(a,))
    ce = F.cross_entropy(o.logits, y)
    total = ce + sum(loss.terms().values())
    total.backward()
    logged(r, case, net, o, y, a, k, dict(loss=total, cross_ent=ce))
    grads = net.original_views({n:p.grad for n,p in net.named_parameters()})
    for n in r.find(rf'{case}\.grad\.(.+)'):
        r.close(f'{case}.grad.{n}', grads[n], 2e-6 if r.arrays[f'{case}.grad.{n}'].dtype == np.float32 else 1e-7, 1e-9)
    for n,g in dict(grad_x_l1=x.grad.abs().sum((1,2,3)), grad_x_img0=x.grad[0]).items():
        if f'{case}.{n}' in r: r.close(f'{case}.{n}', g, 2e-6 if n == 'grad_x_img0' else 1e-7, 1e-9)

@torch.no_grad()
def logged(r, case, net, o, y, a, k, values):
    "The numbers that the original logs"
    least,own,depth = o.distances.least,net.word_class == y[:,None],net.words.shape[1]
    by_class = 'class_specific' in case
    values |= dict(acc=(o.logits.argmax(1) == y).double().mean(), l1=weight_norm(net.last.weight),
                   cluster=o.distances.cluster(own, depth) if by_class else o.distances.cluster(),
                   separation=o.distances.cluster(~own, depth), avg_separation=o.distances.separation(own),
                   attn_loss=attention_loss(o.distances.nearest_maps(o.z, net.words, k), a, corners=True),
                   p_dist_pair=net.word_distance())
    for n in values:
        if f'{case}.{n}' in r: r.close(f'{case}.{n}', values[n], 1e-9)

def stream(x, y):
    "Images as evaluation hands them out, a few at a time"
    size = torch.tensor(x.shape[2:]).expand(len(x), 2)
    for i in range(0, len(x), 5):
        at = torch.arange(i, min(i+5, len(x)))
        yield x[at],Batch(at, ['']*len(at), size[at], size[at], label=y[at])

class Staged(WordPhases):
    "Our phases on recorded images, remembering the model after each"
    def __init__(self, x, y, attention, **kw):
        super().__init__(**kw)
        self.data,self.attention,self.stages,self.losses,self.count = (x,y),attention,{},[],0

    def images(self): return stream(*self.data)

    def keep(self, stage): self.stages[stage] = copy.deepcopy(self.learn.model).eval()

    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.item())
        self.learn.loss = self.learn.loss.float() # fastai's smoothed loss is float32; the gradient is of another copy

    def after_train(self):
        if self.epoch == self.settings.warm-1: self.keep('s1_warm')
        super().after_train()

    def project(self):
        self.keep('s2_joint')
        super().project()
        words = self.learn.model.words
        words.data = words.data.float().double() # the original stores patches in float32
        self.keep('s3_push')

    def fit_last(self):
        super().fit_last()
        self.keep('s4_last')

    def last_loss(self, x, y):
        "The loss, and its logged value: with the terms that have no gradient here"
        twin,n = copy.deepcopy(self.learn.model),len(self.data[0])
        a = self.attention[self.count%n:self.count%n+len(x)]
        self.count += len(x)
        loss,l = super().last_loss(x, y),self.learn.word_loss
        with torch.no_grad():
            o = twin(x)
            rest = .8*o.distances.cluster()
            rest += 10*attention_loss(o.distances.nearest_maps(o.z, twin.words, l.top), a, corners=True)
        self.losses.append((loss+rest).item())
        return loss

def train(r):
    "Two warm, two joint epochs, a projection, two epochs of the last layer, as in the original's order"
    state = recorded(r, 's0_init')
    x,y,a = normalized(r.tensor('raw_u8')),r.tensor('y'),r.tensor('attn_u8').double()/255
    bs = -(-len(x)//r.arrays['losses'].shape[1])
    dls = DataLoaders(*(DataLoader(list(zip(x, y, a)), bs=bs, shuffle=False) for _ in range(2)), device='cpu')
    dls.n_inp = 1
    phases = Staged(x, y, a, warm=2, start=3, every=1, last_epochs=2, last_lr=1e-4, step=1, gamma=.1, weight_decay=1e-3,
                    reset=True, compat=True)
    learn = PartLearner(dls, rebuilt(state), loss_func=F.cross_entropy, splitter=split_params,
                        cbs=[WordLoss(compat=True), phases])
    with learn.no_bar(), learn.no_logging():
        fit_run(learn, 4, optimizer='adam', lr=(1e-4,3e-3), schedule='constant')
    after_stages(r, phases, x, y)
    r.close('losses', np.array(phases.losses).reshape(-1, r.arrays['losses'].shape[1]), 1e-8)
    projection(r, phases.stages, x, y)

def normalized(u8):
    "ImageNet normalisation in float64"
    mean,std = (torch.tensor(s, dtype=torch.float64)[:,None,None] for s in imagenet_stats)
    return (u8.double()/255 - mean)/std

def after_stages(r, phases, x, y):
    "States and accuracies of all stages"
    for stage,net in phases.stages.items():
        views = net.original_views()
        for k in r.find(rf'{stage}\.(.+)'): r.close(f'{stage}.{k}', views[k], 1e-6, 1e-9)
    for name,stage in dict(joint='s2_joint', push='s3_push', last='s4_last').items():
        with torch.no_grad(): right = (phases.stages[stage](x).logits.argmax(1) == y).double().mean()
        r.near(f'acc_test_{name}', right, 1e-9)

def projection(r, stages, x, y):
    "Boxes, maps, files and words of the projection, over all classes and by class"
    field = ReceptiveField.of_chain([(r.arrays['s0_init.features.conv.weight'].shape[2],)*2+(0,)], x.shape[2])
    images = dict(enumerate(r['raw_u8'].transpose(0,2,3,1)))
    near = project_words(copy.deepcopy(stages['s2_joint']), stream(x, y), distinct=False)
    with tempfile.TemporaryDirectory() as d:
        bb,rf = OriginalFiles(images, field).projection(near, d, 10)
        r.exact('files', sorted(f.name for f in Path(d).iterdir()))
        overlay = png(Path(d)/'prototype-img-original_with_self_act0.png', r.top('overlay0_png_rgb'))
        r.near('overlay0_png_rgb', overlay, 2/255*max(1, round(r.top('overlay0_png_rgb')/255)*255))
    r.exact('bb', bb)
    r.exact('bb_rf', rf)
    r.close('self_act', log_similarity(near.maps[:,0]), 1e-6, 1e-9)
    r.near('post_push_min_dist_own', nearest_patches(stages['s3_push'], stream(x, y), 1).distance[:,0], 1e-9)
    net = copy.deepcopy(stages['s2_joint'])
    near = project_words(net, stream(x, y), distinct=False, same_class=True)
    boxes = activation_boxes(log_similarity(near.maps[:,0]), x.shape[2:])
    r.exact('cs_push.bb', torch.cat([near.index, boxes, near.label], 1))
    r.close('cs_push.prototype_vectors', net.words[...,None,None], 1e-6, 1e-9)

def png(path, top):
    "A picture in the units of the recording"
    with Image.open(path) as im: a = np.asarray(im.convert('RGB'), dtype=np.float64)
    return a if top > 1 else a/255

def evaluation(r):
    "Attention areas, nearest patches and pruning"
    net = rebuilt(recorded(r, 'p')).eval()
    train,test = (normalize(r.tensor(f'{s}_images').permute(0,3,1,2)) for s in ('train','test'))
    y = r.tensor('train_labels')
    fidelity(r, net, test, r.tensor('test_attn_u8').float()/255)
    with torch.no_grad(): r.near('train_min_distances', net(train).distances.least, 1e-4)
    field = ReceptiveField.of_chain([(r.arrays['p.features.conv.weight'].shape[2],)*2+(0,)], train.shape[2])
    for k in map(int, r.find(r'nearest\.k(\d+)\.labels')): nearest(r, k, nearest_patches(net, stream(train, y), k))
    images,k = dict(enumerate(r['train_images'])),min(map(int, r.find(r'nearest\.k(\d+)\.labels')))
    with tempfile.TemporaryDirectory() as d:
        OriginalFiles(images, field).nearest(nearest_patches(net, stream(train, y), k), 0, d)
        r.exact('nearest.files', sorted(f.name for f in Path(d).iterdir()))
    for case in r.find(r'prune\.(\w+)\.info'): prune(r, case, net, train, y)

def fidelity(r, net, test, attention):
    "Intersection over union of low and of high attention, at every threshold"
    with torch.no_grad(): o = net(test)
    ids = nearest_words(o.distances.least, min(10, len(net.words)))
    maps = log_similarity(o.distances.maps)[torch.arange(len(test))[:,None],ids]
    pooled = AttentionFidelity.pooled(maps, test.shape[2:])
    r.near('pooled_maps', pooled[:len(r.arrays['pooled_maps'])], 2e-3)
    for q in r.find(r'iou\.(\d+)'):
        areas = [[AttentionFidelity.area(m, float(q), low) for m in (pooled,attention)] for low in (True,False)]
        low,high = (AttentionFidelity.iou(*pair) for pair in areas)
        r.near(f'iou.{q}', low, 3e-3)
        r.near(f'iou_mean.{q}', low.mean(), 3e-3)
        r.near(f'iou_high_mean.{q}', high.mean(), 3e-3)
        r.near(f'mask_fraction.{q}', AttentionFidelity.area(attention, float(q), True).double().mean(), 3e-3)
    r['test_labels']

def nearest(r, k, near):
    "The k nearest images of each word: exact but for a pixel of the boxes"
    n,h,w = len(near.index),*near.maps.shape[2:]
    size = r.arrays['train_images'].shape[1:3]
    ours = dict(labels=near.label, act=log_similarity(near.maps),
                high_act_patch_indices=activation_boxes(log_similarity(near.maps).flatten(0,1), size).view(n, k, 4))
    for name in r.find(rf'nearest\.k{k}\.(\w+)'):
        r.near(f'nearest.k{k}.{name}', ours[name], dict(labels=0, act=2e-3, high_act_patch_indices=1)[name])

def prune(r, case, net, train, y):
    "Votes of the nearest training images; named k6_t3: six images, three votes"
    k,least = (int(v[1:]) for v in case.split('_'))
    net = copy.deepcopy(net)
    classes = net.word_class
    gone = (nearest_patches(net, stream(train, y), k).votes(classes) < least).nonzero()[:,0].tolist()
    net.drop_words(gone)
    r.exact(f'prune.{case}.info', [[j, classes[j].item()] for j in gone])
    kept = set(range(len(classes))) - set(gone)
    order = [sorted(kept).index(j) for j in kept] # the original keeps its words in the order of a Python set
    r.exact(f'prune.{case}.last_layer', net.last.weight[:,order])
    r.exact(f'prune.{case}.vectors', net.words[order][...,None,None])

def misc(r):
    "Receptive fields, crops, the attention pooling alone, Grad-CAM"
    fields(r)
    for crop in r.find(r'(crop\d+)\.act'): crops(r, crop)
    size = r.arrays['crop_const.p95'][[1,3]].tolist()
    r.exact('crop_const.p95', activation_boxes(torch.ones(1,3,3), size)[0])
    pooling(r)
    cams(r)

def fields(r):
    "Receptive fields of backbones by name, read off networks without weights"
    keys = [k.split('|') for k in r['rf_keys'].tolist()]
    chains = {}
    for name,size,_ in keys:
        if (name,size) in chains: continue
        with torch.device('meta'):
            net = Backbone(name, 32, 'final')
            chains[name,size] = ReceptiveField.chain(net, torch.zeros(1, 3, int(size), int(size)))
    r.exact('rf_info_n_jump_size_start', [ReceptiveField.of_chain(chains[n,s], int(s), int(k)) for n,s,k in keys])
    for which in r.find(r'rf_boxes_(.+)'):
        name,_,size = which.rpartition('_')
        r.exact(f'rf_boxes_{which}', ReceptiveField.of_chain(chains[name,size], int(size)).boxes(int(size)))

def crops(r, crop):
    "A map enlarged, its boxes and its colours, which may be those of the next level"
    m = r.tensor(f'{crop}.act')[None]
    size = r.arrays[f'{crop}.up'].shape
    up = resize_maps(m, size, 'bicubic')[0]
    r.near(f'{crop}.up', up, 1e-5)
    for q in r.find(rf'{crop}\.p(\d+)'): r.exact(f'{crop}.p{q}', activation_boxes(m, size, float(q))[0])
    r.near(f'{crop}.jet_rgb', heat(up)[::4,::4], 4)

def pooling(r):
    "The attention term alone, in float64"
    d,a,k = r.tensor('pool.distances').requires_grad_(),r.tensor('pool.attn'),int(r['pool.k'])
    ids = nearest_words(d.flatten(2).min(2).values, k)
    sims = log_similarity(d)[torch.arange(len(d))[:,None],ids]
    u = resize_maps(sims.detach(), a.shape[1:], corners=True).amax(1)
    r.exact('pool.topk', ids.sort(dim=1).values)
    r.close('pool.map', u/(u.amax((1,2), keepdim=True)+1e-5), 1e-10)
    loss = attention_loss(sims, a, corners=True)
    loss.backward()
    r.close('pool.loss', loss, 1e-10)
    r.close('pool.grad_distances', d.grad, 1e-10)

class Small(nn.Module):
    "The recorded network of the Grad-CAM"
    def __init__(self, state):
        super().__init__()
        (o,i,k,_),(n,_,k2,_) = state['c1.weight'].shape,state['c2.weight'].shape
        self.c1,self.b1,self.c2 = nn.Conv2d(i, o, k, 4, k//2),nn.BatchNorm2d(o),nn.Conv2d(o, n, k2, 2, k2//2)
        self.act,self.fc = nn.ReLU(),nn.Linear(n, len(state['fc.weight']))
        self.load_state_dict(state)

    def forward(self, x): return self.fc(self.act(self.c2(self.b1(self.c1(x)).relu())).mean((2,3)))

def cams(r):
    "Grad-CAM of the predicted and of a given class"
    net,x = Small(recorded(r, 'gc.p')).eval(),(r.tensor('gc.x_u8').float()/255 - .5)/.25
    for name,target in dict(map_argmax=None, map_label=r.tensor('gc.y')).items():
        m,logits = BaseModel(net, 'act').cams(x, target)
        r.near(f'gc.{name}', to_unit(resize_maps(m, x.shape[2:])), 1e-5)
    r.near('gc.logits', logits, 1e-5)

pieces = dict(head=head, train=train, eval=evaluation, misc=misc)
