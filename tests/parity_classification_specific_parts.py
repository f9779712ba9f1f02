"Classification-specific parts against the numbers of tests/fixtures/parity/classification_specific_parts.md"
import math, tempfile
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models.inception_v3 import InceptionA
from torch import nn

from interp_parts.classification_specific_parts import published
from interp_parts.classification_specific_parts.boxes import find_boxes, searches
from interp_parts.classification_specific_parts.clusters import FEATURES, cluster_pixels
from interp_parts.classification_specific_parts.published import published_inception, published_search
from interp_parts.classification_specific_parts.saliency_maps import correct, features_of, input_gradients, minmax, salient, saliency
from interp_parts.classification_specific_parts.svm import LinearSVM
from interp_parts.data.readers.file_lists import write_part_locs

def shares(r, name, theirs, ours, least):
    "At least the share `least` of the elements is equal; the self-test changes three times as many as may differ"
    theirs,ours = np.asarray(theirs),np.asarray(ours)
    def unlike(shift):
        if theirs.shape != ours.shape: return 1.
        n,other = shift*math.ceil(3*(1-least)*theirs.size),theirs.copy()
        other.flat[:n] = np.where(ours.flat[:n] == 0, 1, 0)
        return (other != ours).mean()
    r.judge(name, 1-least, unlike)

def no_worse(r, name, theirs, ours, tol):
    "Ours is nowhere more than `tol` above theirs; the self-test lowers theirs to 3 tolerances below ours"
    theirs,ours = np.asarray(theirs, float),np.asarray(ours, float)
    r.judge(name, tol, lambda shift: (ours - (np.minimum(theirs, ours) - 3*tol if shift else theirs)).max())

def elementwise(r, name, ours, rtol, atol):
    "Tolerance that grows with the recorded value; what is not a number has to be none in both"
    theirs,ours = r[name].astype(float),np.asarray(ours, float)
    if (np.isnan(theirs) != np.isnan(ours)).any(): r.fail(f'{name}: not a number in other places')
    theirs,ours = np.nan_to_num(theirs),np.nan_to_num(ours)
    tol = atol + rtol*np.abs(theirs)
    r.judge(name, 1, lambda shift: (np.abs(ours - theirs - shift*3*tol)/tol).max())

def extract(r):
    "One saliency map to boxes, by the original's search"
    k,least = int(r['K']),int(r['min_bbox'])
    colors = minmax(torch.from_numpy(r['image_u8'].astype(np.float32)/255*2-1)[None], (-2,-1))
    if 'im_back' in r: r.near('im_back', colors[0,:,:4,:4].permute(1,2,0), 1e-6)
    if 'grad' in r:
        s = saliency(torch.from_numpy(r['grad'].astype(np.float64)))
        r.near('saliency_sub4', s[::4,::4], 1e-6)
    else: s = torch.from_numpy(r['saliency'].astype(np.float64))
    q = correct(s[None], float(r['sigma']), float(r['gamma']))
    r.near('corrected_sub4', q[0,::4,::4], 1e-5)
    mask = salient(q, str(r['thresh']))
    shares(r, 'mask', np.unpackbits(r['mask'])[:mask.numel()].reshape(mask.shape[1:]), mask[0].numpy().astype(np.uint8), .999)
    clusters(r, q, mask, k, colors.double(), tuple(r['composition'].tolist()))
    regions = cluster_regions(r['labels'], k, bool(r['fit_object']))
    boxes(r, regions, q[0].numpy(), '', least=least)
    objectives(r, regions, q, least)
    lines(r)

def clusters(r, q, mask, k, colors, features, end=''):
    "Starts, labels and centres"
    labels,starts,first,c,_ = cluster_pixels(q, mask, k, colors, features, own_frame=True)
    if 'init_coords' in r:
        r.exact('init_coords', starts[0].T)
        r.near('init_feats', first[0], 1e-6)
    shares(r, f'labels{end}', r[f'labels{end}'], labels[0].numpy(), .995)
    centers(r, f'centers{end}', c[0], q.shape[1:])

def centers(r, name, c, size):
    "Half a pixel in the first two columns, which are scaled by height and width, and as much in the others"
    scale = torch.ones(c.shape[1], dtype=c.dtype)
    scale[:2] = torch.tensor(size, dtype=c.dtype)[:c.shape[1]]
    for j in range(c.shape[1]): r.near(name, c[:,j]*scale[j], .5 if j < 2 else .5/min(size), at=(slice(None),j))

def cluster_regions(labels, k, whole=False):
    "Regions of the recorded labels; an empty one is the whole mask, and so is a further one"
    mask = labels >= 0
    out = [labels == i for i in range(k)] + [mask]*whole
    return np.stack([m if m.any() else mask for m in out])

def as_rows(found):
    "y0, x0, y1, x1 as the recorded rows i, x, y, w, h"
    return np.array([(i, x0, y0, x1-x0, y1-y0) for i,(y0,x0,y1,x1) in enumerate(found)], float)

def boxes(r, regions, q, end, **options):
    "Tight boxes exactly, searched ones to a pixel"
    tight = [published_search(m, q, search=None, **options)[0] for m in regions]
    r.exact(f'boxes_simple{end}', as_rows(tight))
    r.near(f'boxes{end}', as_rows([published_search(m, q, **options)[0] for m in regions]), 1)

def search_area(region, q, least):
    "The saliency that a search looks at"
    ys,xs = np.nonzero(region)
    y0,x0,y1,x1 = published._minimum((ys.min(), xs.min(), ys.max(), xs.max()), least)
    return (region*(q-q.min())/(q.max()-q.min()))[y0:y1,x0:x1]

def objectives(r, regions, q, least):
    "The objective at the start, at the recorded solution and of the whole area; and what our searches reach"
    rec,areas = r['objective'],[search_area(m, q[0].numpy(), least).cumsum(0).cumsum(1) for m in regions]
    value = lambda bs: [published._objective(b, I) for b,I in zip(bs, areas)]
    r.near('objective', value([(.25,.25,.75,.75)]*len(rec)), 1e-5, at=(slice(None),4))
    r.near('objective', value(rec[:,:4]), 1e-5, at=(slice(None),5))
    r.near('objective', value([(0,0,1,1)]*len(rec)), 1e-5, at=(slice(None),6))
    found = [published_search(m, q[0].numpy(), least)[1].fun for m in regions]
    no_worse(r, 'objective, L-BFGS', rec[:,5], found, .02)
    exact = searches['exact'](torch.from_numpy(regions)[None], q, least)[1][0]
    no_worse(r, 'objective, exact', rec[:,5], -exact.numpy(), .02)

def lines(r):
    "The text of part_locs.txt for the recorded boxes"
    ours = written(str(r.arrays['lines']).split()[0], r.arrays['boxes'][:,1:])
    r.exact('lines', np.array(ours))

def written(uuid, rows):
    "part_locs.txt of one image"
    with tempfile.TemporaryDirectory() as d:
        write_part_locs(Path(d)/'part_locs.txt', [uuid], [rows])
        return (Path(d)/'part_locs.txt').read_text()

def papermode(r):
    "The configuration behind the published numbers"
    for i in r.find(r'grad(\d+)'):
        k = int(r[f'K{i}'])
        q = correct(saliency(torch.from_numpy(r[f'grad{i}'].astype(np.float64)))[None], 5., .7)
        r.near(f'corrected_sub4_{i}', q[0,::4,::4], 1e-5)
        colors = minmax(torch.from_numpy(r[f'image_u8_{i}'].astype(np.float64)/255*2-1)[None], (-2,-1))
        clusters(r, q, salient(q, 'mean', inclusive=True), k, colors, FEATURES, i)
        boxes(r, cluster_regions(r[f'labels{i}'], k), q[0].numpy(), i, least=0, recall=True)

def convs(r, strides, pads, scale=1.):
    "The recorded network of two convolutions; its map's mean is the features"
    w1,b1,w2,b2 = (r.tensor(k) for k in ('W1','b1','W2','b2'))
    class Net(nn.Module):
        def forward(self, x):
            x = F.conv2d(x, w1, b1, strides[0], pads[0]).relu()
            return F.conv2d(x, w2, b2, strides[1], pads[1]).relu()*scale
    return Net()

def propagate(r):
    "Selection and gradients of a small network"
    net,x,coef = convs(r, (2,1), (1,1)),r.tensor('x'),r.tensor('coef')
    b,_ = r.tensor('intercept'),r['labels']
    f = features_of(net, x)
    decision = f.double()@coef.T + b
    order = decision.argsort(1)[:,-r.arrays['topk'].shape[1]:]
    w,_ = LinearSVM(coef.float(), torch.zeros(len(coef))).feature_weights(order[:,-1], ('selected','all','weighted'))
    f,g = input_gradients(net, x, w)
    again = input_gradients(net, x, w, batched=True)[1]
    if not torch.equal(g, again): r.fail('one backward pass differs from three')
    r.near('feats', f, 1e-6)
    r.near('decision', decision, 1e-6)
    r.exact('topk', order)
    for i,k in enumerate(('grad_sel','grad_full','grad_weighted')): elementwise(r, k, g[:,i], 1e-4, 1e-8)
    elementwise(r, 'weights_unit', w[:,2], 1e-4, 1e-8)
    r.near('sal_sel', saliency(g[:,0]), 1e-5)
    r.near('sal_full', saliency(g[:,1]), 1e-5)
    r.near('grad2saliency_v041', published._weighted_saliency(g[:,2]), 1e-5)

def svm(r):
    "Both linear classifiers"
    train,test = ((r.tensor(f'{s}_feats').double(),r[f'{s}_labels']) for s in ('train','test'))
    for C in r.find(r'l1_C([\d.]+)_coef'): sparse(r, f'l1_C{C}', float(C), train, test)
    views = dict(glob=lambda f: f[:,-1], all_parts=lambda f: f.flatten(1), local_parts=lambda f: f[:,:-1].flatten(1),
                 all_parts_l2norm=lambda f: F.normalize(f, dim=2).flatten(1))
    for name in r.find(r'l2_(.+)_coef'): scoring(r, f'l2_{name}', views[name], train, test)

def accuracies(r, name, model, train, test):
    "Within one image of the recorded accuracies"
    for i,(x,y) in enumerate((train,test)): r.near(name, model.score(x, y), 1/len(y)+1e-9, at=i)

def sparse(r, name, C, train, test):
    "The L1-SVM: liblinear with the original's settings, ours to the minimum"
    (x,y),(tx,ty) = ((f[:,-1],l) for f,l in (train,test))
    n = len(r.arrays[f'{name}_coef'])
    lib,ours = LinearSVM.fit_liblinear(x, y, n, C),LinearSVM.fit_l1(x, y, n, C, tol=1e-12, gap=1e-12)
    at = torch.cat([r.tensor(f'{name}_coef'), r.tensor(f'{name}_intercept')[:,None]], 1)
    r.exact(f'{name}_nnz', (at[:,:-1] != 0).sum(1))
    if C == .1: # both are at the minimum; at larger C the original stopped before it
        for k,v in dict(coef=lib.coef, intercept=lib.intercept).items(): r.near(f'{name}_{k}', v, 1e-3)
        r.near(f'{name}_nnz', ours.selected.sum(1), 1)
    no_worse(r, f'{name}: objective, of theirs', 1., (ours.objective/LinearSVM(at[:,:-1], at[:,-1]).objective_on(x, y, C)).numpy(), 1e-3)
    no_worse(r, f'{name}_ref_objective', 1., (ours.objective/r.tensor(f'{name}_ref_objective')).numpy(), 1e-3)
    for k,v in dict(coef=ours.coef, intercept=ours.intercept).items(): r.near(f'{name}_ref_{k}', v, 1e-3 if C == .1 else 1e-2)
    r.near(f'{name}_ref_nnz', ours.selected.sum(1), 1)
    accuracies(r, f'{name}_acc', lib, (x,y), (tx,ty))

def scoring(r, name, view, train, test):
    "The L2-SVM by Newton's method"
    (x,y),(tx,ty) = ((view(f),l) for f,l in (train,test))
    ours = LinearSVM.fit_l2(x, y, len(r.arrays[f'{name}_coef']), .1)
    r.near(f'{name}_coef', ours.coef, 1e-2)
    r.near(f'{name}_intercept', ours.intercept, 1e-2)
    accuracies(r, f'{name}_acc', ours, (x,y), (tx,ty))

def misc(r):
    "Minimum size, objectives, boxes in the image, crops and network input"
    r.exact('minbox_out', [published._minimum(b) for b in r['minbox_in'].tolist()])
    I = r['search_area'].cumsum(0).cumsum(1) # in its own precision
    for k in ('recall','precision'): elementwise(r, f'{k}_obj', [published._objective(b, I, k) for b in r['boxes_rel']], 0, 1e-6)
    h,w = r['image'].shape[:2]
    for cc in (1,0):
        ids,b = r['boxes_427'][:,:1],published._rescale(r['boxes_427'][:,1:], w, h, 427, bool(cc))
        rows = np.concatenate([ids, b], 1)
        r.near(f'rescaled_cc{cc}_float', rows, 1e-6)
        r.exact(f'rescaled_cc{cc}_int', rows.astype(np.int32))
        for j in range(len(b)): r.exact(f'crop_cc{cc}_{j}', published._crop(r['image'], b[j]))
    r.near('prep_keep_ratio', published._input(r['image'], r.arrays['prep_keep_ratio'].shape[1]), 2e-3)
    r.near('prep_squash', published._input(r['image'], r.arrays['prep_squash'].shape[1], False), 2e-3)

names = dict(conv1x1='branch1x1', conv5x5_1='branch5x5_1', conv5x5_2='branch5x5_2', conv3x3_1='branch3x3dbl_1',
             conv3x3_2='branch3x3dbl_2', conv3x3_3='branch3x3dbl_3', pool_conv='branch_pool')

def inception_block(r):
    "A block with the original's norms: its averages with padding (their CPU) and without (their GPU)"
    block = InceptionA(8, 3)
    for theirs,ours in names.items(): setattr(block, ours, recorded_conv(r, theirs))
    for kind in ('include','exclude'):
        net = published_inception(block).eval()
        if kind == 'include': net.branch_pool._forward_pre_hooks.clear()
        x = r.tensor('x').requires_grad_()
        y = net(x)
        r.close(f'y_{kind}_pad', y, 1e-4)
        r.close(f'gx_{kind}_pad', torch.autograd.grad(y, x, r.tensor('gy'))[0], 1e-4)

def recorded_conv(r, name):
    "Convolution, norm and ReLU with recorded parameters"
    w = r.tensor(f'p__{name}__conv__W')
    conv = ConvNormAct(w.shape[1], w.shape[0], w.shape[2], padding=w.shape[2]//2)
    with torch.no_grad():
        for own,k in ((conv.conv.weight,w), (conv.bn.bias,r.tensor(f'p__{name}__bn__beta')),
                      (conv.bn.running_mean,r.tensor(f's__{name}__bn__mean')), (conv.bn.running_var,r.tensor(f's__{name}__bn__var'))): own.copy_(k)
    return conv

def pipeline(r):
    "All six steps on a small network"
    images,size,n = unpack(r['images_flat'], r['shapes']),int(r['size']),int(r['n_train'])
    net,y = convs(r, (2,2), (2,1), 8.),torch.from_numpy(r['labels'])
    classes,x = int(y.max())+1,torch.stack([published._input(im, size) for im in images])
    r.near('x0', x[:len(r.arrays['x0'])], 2e-3)
    f = features_of(net, x)
    r.near('global_feats', f, 1e-3)
    g = r.tensor('global_feats').double()
    train,test = (g[:n],y[:n]),(g[n:],y[n:])
    select = LinearSVM.fit_liblinear(*train, classes, float(r['C_l1']), tol=1e-8, max_iter=100000) # stops before the minimum
    ours = LinearSVM.fit_l1(*train, classes, float(r['C_l1']), tol=1e-12, gap=1e-6)
    no_worse(r, 'L1-SVM: objective, of theirs', 1., (ours.objective/select.objective).numpy(), 1e-6)
    r.near('l1_coef', select.coef, 5e-3)
    r.near('l1_intercept', select.intercept, 5e-3)
    accuracies(r, 'l1_acc', select, train, test)
    C = float(r['C_l2'])
    accuracies(r, 'base_acc', LinearSVM.fit_l2(*train, classes, C), train, test)
    preds = select.predict(g)
    r.exact('preds', preds)
    w,_ = select.to(torch.float32).feature_weights(preds, ('selected','all'))
    s = saliency(input_gradients(net, x, w)[1].double())
    r.near('saliency0', s[:len(r.arrays['saliency0']),0], 1e-3)
    for i,kind in enumerate(('sel','full')):
        part_steps(r, kind, s[:,i], images, net, size)
        scores = r.tensor(f'feats_{kind}').double().flatten(1)
        fed = (scores[:n],y[:n]),(scores[n:],y[n:])
        accuracies(r, f'acc_{kind}', LinearSVM.fit_l2(*fed[0], classes, C), *fed)

def unpack(flat, shapes):
    "Images of different sizes out of one array"
    ends = np.cumsum(shapes.prod(1))
    return [a.reshape(s) for a,s in zip(np.split(flat, ends[:-1]), shapes)]

def part_steps(r, kind, s, images, net, size):
    "Boxes within 2 pixels for 95 %, their lines, and the features of their crops"
    q = correct(s, float(r['sigma']), float(r['gamma']))
    found = find_boxes(q, int(r['K']), threshold='otsu', least=int(r['min_bbox']), search='lbfgs', own_frame=True)
    theirs = r[f'boxes_{kind}']
    off = lambda shift: np.abs(found.boxes.numpy() - theirs[...,1:] - 6*shift).max(2)
    r.judge(f'boxes_{kind}', .05, lambda shift: (off(shift) > 2).mean())
    rows = [[[float(v) for v in l.split()[1:]] for l in written('0', b[:,1:]).splitlines()] for b in theirs]
    r.exact(f'locs_{kind}', np.array(rows).astype(np.int64))
    locs = r.arrays[f'locs_{kind}'][...,1:]
    feats = torch.stack([torch.cat([crop_features(net, im, b, size), features_of(net, published._input(im, size)[None])])
                         for im,b in zip(images, locs)])
    r.near(f'feats_{kind}', feats, 2e-3)

def crop_features(net, image, boxes, size):
    "Features of the crops of one image"
    h,w = image.shape[:2]
    crops = [published._crop(image, b) for b in published._rescale(boxes, w, h, size)]
    return features_of(net, torch.stack([published._input(c, size) for c in crops]))

pieces = dict(papermode=papermode, propagate=propagate, svm=svm, misc=misc, inception_block=inception_block,
              pipeline=pipeline, **{f'extract{i}':extract for i in range(1000)}, extract=extract)
