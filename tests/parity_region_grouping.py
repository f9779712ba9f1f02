"Region grouping against the numbers of tests/fixtures/parity/region_grouping.md, which documents arrays and tolerances"
import math, zlib
from collections import Counter
from itertools import count, takewhile

import numpy as np, torch, torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck as ResNetBottleneck

from interp_parts.core import Parts
from interp_parts.training.optim import split_params
from interp_parts.data.views import View
from interp_parts.evaluation.scoring import accuracy
from interp_parts.evaluation.landmarks import KeypointRegression, eye_frame, keypoint_error, part_centers, to_frame, trim_to_stride
from interp_parts.evaluation.pixels import upsample
from interp_parts.visualization.overlays import attention_map, attention_overlay, hard_assignment, part_colors, parts_overlay
from interp_parts.data.readers.faces import _binary_labels as binary_labels, _scale_factors as scale_factors, _scops_filter as scops_filter
from interp_parts.region_grouping.grouping import GroupingUnit
from interp_parts.region_grouping.model import RegionGrouping, _Bottleneck, _part_attention
from interp_parts.region_grouping.prior import _beta_quantiles, _blur_kernel, occurrence, occurrence_loss
from interp_parts.region_grouping.stacked import StackedBottleneck, stacked_attention
from interp_parts.training.losses import PredictionLoss, attribute_accuracy
from interp_parts.training.optim import torch_opt

def grouping(r):
    "The grouping unit: outputs and gradients of every case, and how prototypes start"
    for case in r.find('(.+)_x'): grouping_case(r, case)
    if 'init_smooth' in r: grouping_start(r)

def grouping_case(r, case):
    "Outputs and gradients; 1e-5, and 1e-10 in float64"
    x,w,s = ins = [r.tensor(f'{case}_{k}').requires_grad_() for k in ('x','weight','smooth_factor')]
    unit = GroupingUnit(len(w), w.shape[1])
    parts,assign = torch.func.functional_call(unit, dict(weight=w, smooth_factor=s), (x,))
    out = parts.transpose(1,2)
    cot_out,cot_assign = (r.tensor(f'{case}_cot_{k}') for k in ('out','assign'))
    grads = torch.autograd.grad((out*cot_out).sum() + (assign*cot_assign).sum(), ins)
    for k,v in zip(('out','assign','dx','dweight','dsmooth'), (out,assign,*grads)):
        r.close(f'{case}_{k}', v, 1e-10 if x.dtype == torch.float64 else 1e-5)

def statistics(w):
    "min, max, mean, std and share of 1e-5 of prototypes"
    w = w.detach().double().numpy()
    return np.array([w.min(), w.max(), w.mean(), w.std(), (w == np.float32(1e-5)).mean()])

def seeded_unit(seed, n_parts):
    "A new unit, C = 1024"
    torch.manual_seed(seed)
    return GroupingUnit(n_parts, 1024)

def same_draw(theirs, n_parts, seeds=1000):
    "The statistics of the seed that reproduces the recorded mean and deviation; if none does, the nearest statistics"
    draws = [statistics(seeded_unit(seed, n_parts).weight) for seed in range(seeds)]
    exact,alike = (min(draws, key=lambda s: np.abs(s/theirs-1)[at].sum()) for at in (slice(2,4),slice(1,5)))
    return exact if np.allclose(exact[2:4], theirs[2:4], rtol=1e-5) else alike

def grouping_start(r):
    "The least value exactly, other statistics within 10 %: a single draw's maximum varies by as much from seed to seed"
    theirs,k = r.arrays['init_stats'],len(r.arrays['init_smooth'])
    ours = same_draw(theirs, k)
    r.exact('init_stats', ours[0], at=0)
    for i in range(1, 5): r.near('init_stats', ours[i], .1*abs(theirs[i]), at=i)
    r.exact('init_smooth', seeded_unit(0, k).smooth_factor)

def prior(r):
    "The occurrence prior: blur, quantiles, presence, loss and its gradient"
    for i in r.find(r'kernel(\d+)'):
        radius,std = r[f'kernel{i}_radius_std'].tolist()
        r.close(f'kernel{i}', _blur_kernel(int(radius), std), 1e-6)
    for i in r.find(r'prior(\d+)_quantiles'):
        n,alpha,beta = r[f'prior{i}_N_alpha_beta'].tolist()
        r.near(f'prior{i}_quantiles', _beta_quantiles(int(n), alpha, beta), 1e-6)
    for i in r.find(r'case(\d+)_assign'): prior_case(r, f'case{i}')

def prior_case(r, case):
    "Presence, loss and gradient: 1e-5"
    q = r.tensor(f'{case}_assign').requires_grad_()
    radius,std,alpha,beta = r[f'{case}_cfg_N_K_H_W_radius_std_alpha_beta'][4:].tolist()
    t = occurrence(q, int(radius), std)
    loss = occurrence_loss(t, alpha, beta)
    loss.backward()
    for k,v in dict(occurrence=t, loss=loss, dassign=q.grad).items(): r.close(f'{case}_{k}', v, 1e-5)

def blocks(state, name):
    "Names of the residual blocks of `name`"
    return list(takewhile(lambda b: f'{b}.conv1.weight' in state, (f'{name}.{i}' for i in count())))

def resnet_layer(state, name, stride):
    "Residual blocks with the recorded widths"
    layers = []
    for i,b in enumerate(blocks(state, name)):
        (mid,cin),down = state[f'{b}.conv1.weight'].shape[:2],state.get(f'{b}.downsample.0.weight')
        step = stride if i == 0 else 1
        project = None if down is None else nn.Sequential(nn.Conv2d(cin, len(down), 1, step, bias=False),
                                                          nn.BatchNorm2d(len(down)))
        layers.append(ResNetBottleneck(cin, mid, step, project))
    return nn.Sequential(*layers)

class Trunk(nn.Module):
    "A ResNet up to layer3, of the recorded widths"
    def __init__(self, state):
        super().__init__()
        o,i,side,_ = state['conv1.weight'].shape
        self.conv1,self.bn1 = nn.Conv2d(i, o, side, 2, side//2, bias=False),nn.BatchNorm2d(o)
        self.layer1,self.layer2,self.layer3 = (resnet_layer(state, f'layer{i}', s) for i,s in ((1,1),(2,2),(3,1)))
        self.channels = state['grouping.weight'].shape[1]

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer3(self.layer2(self.layer1(x)))

def recorded_attention(state, n, channels):
    "Attention with the recorded widths; of `n` attributes, or of None for a single label"
    if n is None: return _part_attention(channels, len(state['attconv.0.conv1.weight']))
    keys = (f'attconv.0.{3*i}.weight' for i in count())
    return stacked_attention(n, channels, [len(state[k]) for k in takewhile(state.__contains__, keys)][:-1])

def miniature(state):
    "Our model with the architecture of the original's `state`"
    post,multi = blocks(state, 'post_block'),'mylinear.0.weight' in state
    shapes = [(state[f'{b}.conv1.weight'].shape[1], *(len(state[f'{b}.conv{i}.weight']) for i in (1,3))) for b in post]
    parts,channels = state['grouping.weight'].shape[:2]
    heads = [v for k,v in state.items() if k.startswith('mylinear.') and k.endswith('weight')]
    n,width = len(heads) if multi else len(heads[0]),len(state['groupingbn.weight'])
    net = RegionGrouping(n, parts, multi=multi, compat=True, width=width, blocks=len(post),
                         features=Trunk(state))
    net.post = nn.Sequential(*(_Bottleneck(*s) for s in shapes))
    net.attention = recorded_attention(state, n if multi else None, channels)
    if multi: net.refine = StackedBottleneck(n, width, len(state['nonlinear.0.conv1.weight']))
    return net

def outputs(r, out, stage, **tol):
    "Compare logits, attention and assignment, absolutely"
    for k,v in dict(logits=out.logits, att=out.attention, assign=out.assignment).items(): r.near(stage+k, v, tol[k])

def model(r):
    "A small network: outputs, two optimiser steps, outputs again"
    state,x = {k:r.tensor(f'p0/{k}') for k in r.find('p0/(.+)')},r.tensor('x')
    net = miniature(state)
    net.load_original(state)
    tol = dict.fromkeys(('logits','att','assign'), 1e-4)
    with torch.no_grad(): outputs(r, net.eval()(x), 'eval_', **tol)
    two_steps(r, net.train(), x)
    net.load_original(state | {k:torch.from_numpy(r.arrays[f'{part}/{k}'])
                                for part in ('p2','b2') for k in r.find(f'{part}/(.+)')})
    with torch.no_grad(): outputs(r, net.eval()(x), 'eval2_', **tol)

def two_steps(r, net, x):
    "Losses, gradients, buffers and parameters of two steps on one batch"
    lr,wd,coeff,radius,std,*beta = r['cfg_lr_wd_coeff_radius_std_alpha_beta'].tolist()
    y,blur = r.tensor('y'),(int(radius),std)
    opt = torch_opt('sgd', momentum=.9, weight_decay=wd)(split_params(net), lr=lr)
    opt.set_hypers(lr=[lr,20*lr])
    for step in (1,2):
        out = net(x)
        losses = prediction_loss(net, out.logits, y),occurrence_loss(occurrence(out.assignment, *blur), *beta)
        total = losses[0] + coeff*losses[1]
        opt.zero_grad()
        total.backward()
        r.close(f'losses_step{step}', torch.stack([*losses, total]), 1e-3)
        if step == 1: first_step(r, net, out)
        opt.step()
    views = net.original_views()
    for part,tol in (('p2',1e-2), ('b2',5e-3)):
        for k in r.find(f'{part}/(.+)'): r.close(f'{part}/{k}', views[k], tol)

def prediction_loss(net, logits, y): return PredictionLoss(multi=True)(logits, y > 0) if net.multi else F.cross_entropy(logits, y)

def first_step(r, net, out):
    "Outputs in training, gradients and buffers of the first step"
    outputs(r, out, 'train_', logits=1e-3, att=1e-3, assign=1e-3)
    grads = net.original_views({k:p.grad for k,p in net.named_parameters()})
    for k in r.find('g1/(.+)'): r.close(f'g1/{k}', grads[k], 2e-3, rounding(r, k))
    buffers = net.original_views()
    for k in r.find('b1/(.+)'): r.close(f'b1/{k}', buffers[k], 5e-3)

def rounding(r, name):
    "Least tolerance of a bias: that of a convolution before a batch norm has a gradient of float32 rounding alone"
    layer,_,kind = name.rpartition('.') # terms of the sum are as large as the gradient of the layer's weight
    return 1e-5*r.top(f'g1/{layer}.weight') if kind == 'bias' else 0.

depths = {6:'resnet50', 23:'resnet101', 36:'resnet152'}

def full(r):
    "A network of real widths with generated parameters, evaluated"
    keys = r.arrays['state_keys'].tolist()
    depth = sum(k.startswith('layer3.') and k.endswith('.conv1.weight') for k in keys)
    net = RegionGrouping(int(r['num_classes']), int(r['num_parts']), depths[depth], multi='mylinear.0.weight' in keys,
                         compat=True)
    architecture(r, net)
    salt,x = int(r['salt']),r.tensor('x')
    state = {k:generated(k, v, salt) for k,v in net.original_views().items()}
    net.load_original({**state, 'grouping.weight':r.tensor('grouping_weight')[...,None,None]})
    with torch.no_grad():
        outputs(r, net.eval()(x), '', logits=2e-4, att=1e-4, assign=2e-4)
        r.close('features_mean_abs', net.backbone(x).abs().double().mean(), 1e-4)

def architecture(r, net):
    "Names and shapes of the state, and parameters of each top module"
    shapes = {k:','.join(map(str, v.shape)) for k,v in net.original_views().items()}
    sizes = Counter()
    for k,v in net.original_views(dict(net.named_parameters())).items(): sizes[k.partition('.')[0]] += v.numel()
    named(r, 'state_keys', 'state_shapes', shapes)
    named(r, 'param_groups', 'param_counts', sizes)

def named(r, keys, values, ours):
    "Compare our names and their values with the recorded ones, whose order is the original's"
    same = [k for k in r.arrays[keys].tolist() if k in ours]
    r.exact(keys, same + sorted(ours.keys() - set(same)))
    r.exact(values, [ours[k] for k in same])

def generated(name, old, salt):
    "The parameter that the recording used under this name"
    rng,s = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32),tuple(old.shape)
    if name.endswith('num_batches_tracked'): return old
    one = name.startswith('attconv') and s == (1,)
    ends,layer = name.endswith,name.startswith('layer')
    rules = ((ends('running_var'), .5, 1.5), (ends('running_mean'), -.1, .1), (name == 'grouping.smooth_factor', -1, 1),
             (one and ends('weight'), 3, 6), (one and ends('bias'), 1, 3), (layer and ends('bn3.weight'), .05, .15),
             (layer and ends('downsample.1.weight'), .1, .3), (len(s) == 1 and ends('weight'), .5, 1.),
             (len(s) == 1, -.1, .1))
    v = next((rng.uniform(lo, hi, s) for rule,lo,hi in rules if rule), None)
    if v is None: v = (rng.random_sample(s)*2-1)*math.sqrt(6/np.prod(s[1:]))
    return torch.from_numpy(v.astype(np.float32))

def eval_celeba(r):
    "Landmark regression from maps, in units of the eyes' distance"
    fit,(centers,points,seen) = (celeba_split(r, s) for s in ('fit','eval'))
    pred = KeypointRegression().fit(*fit).predict(centers)
    r.close('eval_pred_normalised', pred, 1e-5)
    r.close('error_percent', 100*keypoint_error(pred, points, seen), 1e-5)

def celeba_split(r, split):
    "Centres and landmarks of a split, compared and then normalised, and their visibility"
    maps,points = r.tensor(f'{split}_assign'),r.tensor(f'{split}_landmarks')
    centers = part_centers(maps, [16*s for s in maps.shape[2:]], compat=True)
    for k,v in dict(centers=centers.flatten(1), annos=points.flatten(1), eyedist=eye_frame(points)[:,2:3]).items():
        r.close(f'{split}_{k}', v, 1e-5)
    frame = eye_frame(points)
    return to_frame(centers, frame),to_frame(points, frame),np.ones(points.shape[:2])

def eval_cub(r):
    "Keypoint regression from images, in units of the box"
    (fit,crops),(test,more) = (cub_split(r, s) for s in ('fit','eval'))
    hw,points,box,boxed = (np.stack(v) for v in zip(*crops, *more))
    r.exact('crop_hw', hw)
    r.close('crop_box', box, 1e-5)
    recorded = r.arrays['crop_landmarks_after_norm'] # in pixels; the notes say in units of the box
    r.close('crop_landmarks_after_norm', min((points,boxed), key=lambda p: distance(p, recorded)), 1e-5)
    centers,points,seen = test
    found = KeypointRegression().fit(*fit).predict(centers),points,seen
    r.close('landmark_error_and_count', keypoint_error(*found, each=True), 1e-5)
    r.close('error_percent', 100*keypoint_error(*found), 1e-5)

def distance(a, b): return np.abs(a-b).sum() if a.shape == b.shape else np.inf

def cub_split(r, split):
    "Centres, keypoints and visibility of a split, in units of the box and compared, and its trimmed images"
    cols = [r[f'{split}_{k}'] for k in ('H','W','box_raw','landmarks_raw','blob_xy')]
    rows,crops = zip(*(cub_image(int(r['K']), *row) for row in zip(*cols)))
    centers,points,seen = (torch.cat(v) for v in zip(*rows))
    got = dict(centers_norm=centers.flatten(1), annos_norm=points.flatten(1), masks=seen.repeat_interleave(2, 1))
    for k,v in got.items(): r.close(f'{split}_{k}', v, 1e-5)
    return (centers,points,seen),crops

def cub_image(k, h, w, box, landmarks, blobs):
    "Centres, keypoints and visibility of one image; its size, keypoint and box rows after trimming"
    (y,x,nh,nw),pts,b = trim_to_stride(int(h), int(w), torch.from_numpy(landmarks[:,1:]), torch.from_numpy(box[1:]))
    maps = blob_maps(blob_image(blobs, h, w)[:,y:y+nh,x:x+nw], k)
    centers = to_frame(part_centers(maps, (nh,nw), compat=True), b[None])
    points = to_frame(pts[None,:,:2], b[None])
    rows,boxed = (np.concatenate([landmarks[:,:1], p, pts[:,2:]], 1) for p in (pts[:,:2],points[0]))
    return (centers,points,pts[None,:,2]),((nh,nw),rows,np.concatenate([box[:1], b]),boxed)

def blob_image(xy, h, w):
    "An image with a blob in each channel"
    row,col = np.mgrid[:h,:w]
    d = (col-xy[:,0,None,None])**2 + (row-xy[:,1,None,None])**2
    return torch.from_numpy(np.exp(-d/(2*14**2)).astype(np.float32))

def blob_maps(im, k):
    "What the recording has in place of a network"
    z = 6*F.avg_pool2d(im[None], 16)
    return torch.cat([z, z.mean(1, keepdim=True)], 1)[:,:k].softmax(1)

def metrics(r):
    "Accuracies in percent and the weighted mean"
    bits = r.tensor('bin_logits'),r.tensor('bin_target')
    bits = bits[0],bits[1].view(bits[0].shape)
    r.close('bin_acc_threshold_half_on_logit', 100*attribute_accuracy(*bits, .5, each=True).mean(), 1e-5)
    r.close('bin_acc_threshold_zero', 100*attribute_accuracy(*bits, each=True).mean(), 1e-5)
    r.close('top1', 100*accuracy(r.tensor('cls_logits'), r.tensor('cls_target')), 1e-5)
    r.close('meter_avg', np.average(r['meter_vals'], weights=r['meter_n']), 1e-5)

def vis(r):
    "Colours, maps and overlays of one image"
    rgb,maps,att = r['input_rgb'],r.tensor('assign'),r.tensor('att')
    size = rgb.shape[:2]
    heat = attention_map(att, maps, size)
    r.near('att_map', heat, 1e-5)
    r.near('att_overlay_rgb', attention_overlay(rgb, heat, compat=True), 1)
    r.exact('hard', hard_assignment(maps, size)[0])
    r.exact('assign_overlay_rgb', parts_overlay(rgb, Parts(maps, torch.ones(maps.shape[:2])), alpha=.4, compat=True))
    r.near('part_maps_uint8', (upsample(maps[0], size).numpy()*255).astype(np.uint8), 1)
    r.close('colors', 255*part_colors(maps.shape[1]), 1e-9)

def data(r):
    "Filter, labels and scaling of annotations"
    celeba_data(r)
    cub_data(r)

def celeba_data(r):
    "The 30 % face filter, labels 0 and 1, landmarks on 256 x 256"
    w,h,ids = r['celeba_width'],r['celeba_height'],r['celeba_listed']
    at = ids-1
    kept = ids[scops_filter(w[at], h[at], r['celeba_bbox'][at])]
    at,f = kept-1,scale_factors(w, h, 256)
    points = r['celeba_landmarks']
    r.exact('celeba_kept_ids', kept)
    r.exact('celeba_target', binary_labels(r['celeba_attr'][at]))
    r.close('celeba_landmarks_256', points[at].reshape(len(at), -1, 2)*f[at,None], 1e-5)

def cub_data(r):
    "Keypoints, boxes and size with a shorter side of 448"
    hw,points,box = r['cub_shape_hw'],r['cub_parts_raw'].copy(),r['cub_box_raw'].copy()
    f = scale_factors(hw[:,1], hw[:,0], 448, 'short')
    points[...,1:3] *= np.where(points[...,3:], f[:,None], 1)
    box[:,1:] *= np.tile(f, 2)
    r.close('cub_parts_448', points, 1e-5)
    r.close('cub_box_448', box, 1e-5)
    r.exact('cub_resized_hw', [View(448).place(w, h).scaled[::-1] for h,w in hw.tolist()])

pieces = dict(grouping=grouping, prior=prior, model=model, full=full, eval_celeba=eval_celeba, eval_cub=eval_cub,
              metrics=metrics, vis=vis, data=data)
