"Contrastive reconstruction against the numbers of tests/fixtures/parity/contrastive_reconstruction.md"
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np, torch, torch.nn.functional as F
from fastai.vision.core import TensorMask
from PIL import Image
from torch import nn

from interp_parts.contrastive_reconstruction.crops import (instance_crop, _crop_box as crop_box,
                                                           _jitter_box as jitter_box, _square_box as square_box)
from interp_parts.contrastive_reconstruction.frozen import VGGTaps, rgb_to_lab
from interp_parts.contrastive_reconstruction.keypoint_scores import (_KeypointClusters as KeypointClusters,
    _at_points as at_points, _name_points as name_points, _regression_columns as regression_columns, trainer_centers)
from interp_parts.contrastive_reconstruction.losses import (contrastive_loss, draw_positives,
                                                            equivariance_loss, part_moments, upsample_logits)
from interp_parts.contrastive_reconstruction.model import (BGR_MEAN, ContrastiveReconstruction,
                                                           _Segmented as Segmented, _poly_lr as poly_lr)
from interp_parts.contrastive_reconstruction.networks import UNet
from interp_parts.contrastive_reconstruction.pictures import (_drawing_centers as drawing_centers,
                                                              _voc_colors as voc_colors)
from interp_parts.contrastive_reconstruction.pixel_scores import (_PixelScores as PixelScores,
                                                                  _pad_square as pad_square, _scale_longest as scale_longest)
from interp_parts.contrastive_reconstruction.published import _original_net
from interp_parts.contrastive_reconstruction.step import Reconstruction
from interp_parts.contrastive_reconstruction.warps import (RandomWarp, warp, _control_points as control_points,
    _move_points as move_points, _projective as projective, _random_similarity as random_similarity,
    _similarity as similarity, _tps_grid as tps_grid, _tps_inverse as tps_inverse)
from interp_parts.core import Batch, Parts
from interp_parts.data.readers.parts import (DEEPFASHION_COLORS, _area_part as area_part, _decode_colors as decode_colors,
                                             _paint_parts as paint_parts, pascal_parts, tight_box)
from interp_parts.evaluation.clustering import Contingency, ari, nmi
from interp_parts.evaluation.landmarks import part_centers, to_frame, trim_to_stride
from interp_parts.training.optim import torch_opt

def generated(n, i, seed):
    "`n` numbers in -0.5..0.5: entry `i` of the rule that made the recorded parameters"
    h = (np.arange(1, n+1, dtype=np.uint64)*2654435761 + (i+1)*2246822519 + (seed+1)*3266489917) & 0xffffffff
    h ^= h >> 15
    h = (h*2246822519) & 0xffffffff
    h ^= h >> 13
    h = (h*3266489917) & 0xffffffff
    h ^= h >> 16
    return h/2**32 - .5

def fill(net, seed):
    "The recorded parameters"
    state = {k:v for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    with torch.no_grad():
        for i,(k,p) in enumerate(state.items()): p.copy_(torch.from_numpy(parameter(k, p.shape, i, seed)))
    return net

def parameter(name, shape, i, seed):
    "A recorded parameter by its name"
    u = generated(int(np.prod(shape)), i, seed).reshape(shape)
    if len(shape) == 4: return u*np.sqrt(24/np.prod(shape[1:]))
    if name.endswith('running_var'): return 1 + .5*u
    if name.endswith('bn3.weight'): return .2 + .1*u
    return (1 if name.endswith('.weight') else 0) + .2*u

def find_seed(fits, first=11):
    "The seed of the recording, which the files do not hold: the first that `fits`"
    return next((s for s in chain([first], range(200)) if fits(s)), first)

def like(ours, theirs, tol=1e-2):
    "Are two arrays equal enough to belong to the same seed?"
    ours,theirs = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in (ours, theirs))
    return np.abs(ours-theirs).max() <= tol*np.abs(theirs).max()

def losses(r):
    "Losses and gradients: ours in float64 to 1e-7, in float32 to 1e-5; gradients to 1e-3 of their largest value"
    kept = {dtype: loss_case(r, dtype) for dtype in (torch.float64, torch.float32)}
    for dtype,(l,loss,m) in kept.items():
        end,tol = ('',1e-7) if dtype == torch.float64 else ('_f32',1e-5)
        for k in ('sc','rgb','con_t019'): r.close(f'loss_{k}{end}', loss[k], tol)
    l,loss,m = kept[torch.float32]
    for k,name in dict(sc='sc', rgb='rgb', con_t019='con_logits').items():
        r.close(f'grad_{name}', torch.autograd.grad(loss[k], l, retain_graph=True)[0], 1e-3)
    r.close('basis', m.mean(), 1e-5)
    other_temperatures(r)
    degenerate(r)
    equivariance(r)

def loss_case(r, dtype, deg=False):
    "Logits, losses and moments of the recorded case, or of one with an absent part and an empty mask"
    l,mask,feat,rec = (r.tensor(k).to(dtype) for k in ('logits','mask','feat','rec'))
    if deg: l[:,-1] -= 200; mask[0] = 0
    l.requires_grad_()
    q,area = l.softmax(1)*mask,mask.sum((1,2,3))
    m = part_moments(q, [feat*mask])
    con = contrastive_loss(m.mean(), r.tensor('rand_idx'))
    return l,dict(sc=m.consistency(area).sum(), rgb=part_moments(q, [rec]).consistency(area).mean(), con_t019=con),m

def other_temperatures(r):
    "The contrast of the recorded descriptors at other temperatures"
    for t in r.find(r'grad_con_basis_t(\d+)'):
        basis = r.tensor('basis').double().requires_grad_()
        loss = contrastive_loss(basis, r.tensor('rand_idx'), float(f'{t[0]}.{t[1:]}'))
        r.close(f'loss_con_t{t}', loss, 1e-5) # the descriptors are stored in float32
        r.close(f'grad_con_basis_t{t}', torch.autograd.grad(loss, basis)[0], 1e-3)

def degenerate(r):
    "Finite values where a part is nowhere and a mask empty"
    l,loss,m = loss_case(r, torch.float64, deg=True)
    for k,name in dict(sc='sc', rgb='rgb', con_t019='con').items(): r.close(f'deg_loss_{name}', loss[k], 1e-7)
    r.close('deg_basis', m.mean(), 1e-5)
    r.close('deg_grad_total', torch.autograd.grad(sum(loss.values()), l)[0], 1e-3)

def equivariance(r):
    "The divergence of warped logits, and its gradient"
    p = r.tensor('eqv_pred_tps').double().requires_grad_()
    loss = equivariance_loss(r.tensor('eqv_target_logits').double(), p, r.tensor('eqv_mask').double())
    r.close('eqv_loss', loss, 1e-7)
    r.close('eqv_grad', torch.autograd.grad(loss, p)[0], 1e-3)

def tps(r):
    "Splines to 2e-5, the limit of the original's float32 inverse; warped images to 1e-3"
    image,n = r.tensor('image'),r.arrays['affine_grid'].shape[1]
    side = round(len(r.arrays['target_points'])**.5)
    r.near('target_points', control_points(side), 1e-6)
    r.near('inverse_kernel', tps_inverse(side), 2e-5)
    grids = {m: tps_grid(r.tensor(f'{m}_source_points'), (n,n)) for m in ('affine','projective')}
    for m,g in grids.items(): r.near(f'{m}_grid', g, 2e-5)
    g = grids['affine']
    for k in r.find('warp_image_(zeros|border)'): r.near(f'warp_image_{k}', warp(image, g, padding=k), 1e-3)
    r.near('warp_mask_zeros', warp((image[:,:1] > .5).float(), g), 1e-3)
    mostly(r, 'warp_image_nearest', warp(image, g, 'nearest'), 1e-3, .005)
    matrices(r)

def mostly(r, name, ours, tol, share):
    "Compare, but let a share of the elements differ: a nearest pixel may be the neighbour"
    ours,theirs = np.asarray(ours).astype(np.float64),r.arrays[name].astype(np.float64)
    unlike = np.abs(ours-theirs) > tol
    if unlike.mean() <= share: ours = np.where(unlike, theirs, ours)
    r.near(name, ours, tol)

def matrices(r):
    "The matrices that the recorded ones decompose into, their effect on points, and the seeded draws"
    a = r.tensor('affine_matrix').view(-1, 2, 3)
    ours = similarity(torch.atan2(a[:,1,0], a[:,0,0]), a[:,:,0].norm(dim=1), a[:,0,2], a[:,1,2])
    r.near('affine_matrix', ours.flatten(1), 1e-9)
    still = torch.linalg.solve(a[:,:,:2], (r.tensor('affine_source_points').double() - a[:,None,:,2]).transpose(1,2))
    r.near('affine_source_points', move_points(still.transpose(1,2), a), 1e-6)
    m = r.tensor('projective_matrix')
    ay,ax = -m[:,2,0].asin(),torch.atan2(m[:,2,1], m[:,2,2])
    z = m @ torch.linalg.inv(projective(ax, ay, 0*ax, 0*ax+1).transpose(1,2))
    ours = projective(ax, ay, torch.atan2(z[:,1,0], z[:,0,0]), z[:,:2,0].norm(dim=1))
    r.near('projective_matrix', ours.transpose(1,2), 1e-9)
    np.random.seed(int(r['theta_seed']))
    r.near('theta_seeded', random_similarity(len(r.arrays['theta_seeded'])).flatten(1), 1e-9)

def recorded_net(keys, shapes):
    "Our network for recorded names and shapes"
    state = {k: torch.empty([int(n) for n in s.split('x') if n], device='meta') for k,s in zip(keys, shapes)}
    return ContrastiveReconstruction(**_original_net(state))

def deeplab(r):
    "Names, what is trained, outputs and gradients: 1e-3; in training 3e-3"
    keys,x = r.arrays['keys'].tolist(),r.tensor('x').requires_grad_()
    model = recorded_net(keys, r.arrays['shapes'].tolist())
    net = model.net
    fill(net, find_seed(lambda s: first_mean(r, s)))
    names(r, model, net)
    net.eval()
    instance,part = net.features(x)
    logits = net.layer5(part)
    r.close('eval_logits', logits, 1e-3)
    for k,f in dict(part=net.unit_parts(part), instance=instance).items():
        name = f'eval_feature_{k}_head'
        if name in r: r.close(name, f[:,:r.arrays[name].shape[1]], 1e-3)
    (logits*r.tensor('G')).sum().backward()
    r.close('eval_grad_x', x.grad, 1e-3)
    grads = dict(net.named_parameters())
    norm = lambda k: -1. if k not in grads or grads[k].grad is None else grads[k].grad.double().norm().item()
    r.arrays['eval_param_grad_norm'] = np.nan_to_num(r.arrays['eval_param_grad_norm'], nan=-1) # none: -1
    r.close('eval_param_grad_norm', np.array([norm(k) for k in keys]), 1e-3)
    trained(r, net)

def first_mean(r, seed):
    "Does the seed give the running mean of the first channel after a batch?"
    x = r.tensor('x')
    w = torch.from_numpy(parameter('conv1.weight', (64,3,7,7), 0, seed)[:1]).float()
    old,new = parameter('bn1.running_mean', (64,), 3, seed)[0],F.conv2d(x, w, stride=2, padding=3).mean().item()
    return abs(.9*old + .1*new - r.arrays['train_bn1_running_mean'][0]) < 1e-4

def names(r, model, net):
    "Names, shapes, what takes a gradient, and the group of each parameter"
    state,params = net.state_dict(),dict(net.named_parameters())
    group = {id(p):i for i,g in enumerate(model.groups()) for p in g}
    r.exact('keys', list(state))
    r.exact('shapes', ['x'.join(map(str, v.shape)) for v in state.values()])
    r.exact('requires_grad', [int(params[k].requires_grad) if k in params else -1 for k in state])
    r.exact('lr_group', [group.get(id(params[k]), -1) if k in params else -1 for k in state])

def trained(r, net):
    "Outputs and running statistics of one batch in training mode"
    with torch.no_grad(): r.close('train_logits', net.train()(r.tensor('x')), 3e-3)
    state = net.state_dict()
    for k in ('mean','var'): r.close(f'train_bn1_running_{k}', state[f'bn1.running_{k}'], 3e-3)
    name = 'train_l4_bn3_running_var_head'
    last = [k for k in state if re.fullmatch(r'layer4\.\d+\.bn3\.running_var', k)][-1]
    r.close(name, state[last][:len(r.arrays[name])], 3e-3)

def unet_vgg(r):
    "UNet and VGG19 taps: 1e-3"
    x,keys = r.tensor('unet_x'),r['unet_keys'].tolist()
    unet = UNet(r.arrays['unet_logits'].shape[1], sum(bool(re.fullmatch(r'up\d+\.up\.weight', k)) for k in keys))
    r.exact('unet_keys', list(unet.state_dict()))
    with torch.no_grad():
        seed = find_seed(lambda s: like(fill(unet, s)(x), r.arrays['unet_logits']))
        r.close('unet_logits', fill(unet, seed)(x), 1e-3)
        still = dict(stats=((0,0,0),(1,1,1)))
        for norm,names in ((False,('relu3_2','relu5_4')), (True,('norm_relu3_2_head','norm_relu5_4'))):
            net = VGGTaps(norm=norm, **still)
            fill(net.features, seed)
            for f,name in zip(net(r.tensor('vgg_x')), names): r.close(name, f[:,:r.arrays[name].shape[1]], 1e-3)

def one_buffer(r, *names):
    "Were these arrays recorded from one tensor that changed afterwards? Then all hold its last value"
    return all(np.array_equal(r.arrays[names[0]], r.arrays[n]) for n in names[1:])

def before_steps(r, name, group, momentum=.9, wd=5e-4):
    "A weight before the two steps. Where the recording holds the last value instead, the recorded gradients are undone"
    layer,kind = name.split('.')
    w,ours = r[f'p0_{layer}_{kind}'].astype(np.float64),f'p0_{layer}_{kind}'
    if not one_buffer(r, ours, f'it1_after_{name}'): return w
    (l0,l1),(g0,g1) = ([r.arrays[f'clip5_{it}_{k}'] for it in ('it0','it1')] for k in ('lr', f'grad_{name}'))
    l0,l1 = l0[group],l1[group]
    return (w + ((1-l1*wd)*l0 + momentum*l1)*g0 + l1*g1)/((1-l1*wd)*(1-l0*wd) - momentum*l1*wd)

class StandIn(nn.Module):
    "The recording's model of two convolutions"
    def __init__(self, r):
        super().__init__()
        for i,(n,kw) in enumerate((('a',dict(stride=4, padding=2)), ('b',dict(padding=1)))):
            w,b = (torch.from_numpy(before_steps(r, f'{n}.{k}', i)).float() for k in ('weight','bias'))
            conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], **kw)
            conv.load_state_dict(dict(weight=w, bias=b))
            setattr(self, n, conv)

    def forward(self, x): return Segmented(self.b(self.a(x/60).relu()))

class Recorded(Reconstruction):
    "The step with recorded jitters and draws"
    def before_batch(self):
        super().before_batch()
        self.learn.xb,self.second = (self._normal(self.jittered[0]),),self.jittered[1]

    def views(self, k):
        v = super().views(k)
        v.grid,v.which = self.draws
        return v

bgr = tuple(m/255 for m in BGR_MEAN),(1/255,)*3

def new_step(r, seed):
    "Model and callback as they are before the first recorded step"
    net,phi = StandIn(r),VGGTaps(div=16)
    fill(phi.features, seed)
    rec = Recorded(phi, skip_first=True, batch_sum=True)
    rec.jittered = [r.tensor(k).float()/255 for k in ('cj1','cj2')]
    rgb = r.tensor('rgb_u8').permute(0,3,1,2).float()
    x = rgb - torch.tensor(BGR_MEAN)[:,None,None]
    rec.x = x
    rec.learn = SimpleNamespace(model=net, dls=SimpleNamespace(stats=bgr), training=True,
                                extra=(TensorMask(r.tensor('mask')[:,0]),))
    return net,rec,rgb

def draws(r, seed):
    "Positives and warp of a step, drawn as the original does; its seeds of PyTorch and NumPy are the same number"
    b,k,size = len(r.arrays['mask']),len(r.arrays['p0_b_bias']),r.arrays['mask'].shape[2:]
    torch.manual_seed(seed)
    np.random.seed(seed)
    which = draw_positives(b, k, skip_first=True)
    return RandomWarp().grid(torch.zeros(b, 1, *size)),which

def redrawn(r):
    "Grids and positives of both steps, from the seeds that give the recorded ones"
    same = lambda it,which: np.array_equal(which, r.arrays[f'clip5_{it}_rand_idx'])
    last = lambda s: (lambda g,w: same('it1', w) and like(g, r.arrays['it1_grid'], 1e-4))(*draws(r, s))
    seed = find_seed(last, 17)
    first = find_seed(lambda s: same('it0', draws(r, s)[1]), seed-1)
    out = dict(it0=draws(r, first), it1=draws(r, seed))
    for it in out: r.near(f'{it}_grid', out['it1' if one_buffer(r, 'it0_grid', 'it1_grid') else it][0], 2e-5)
    for kind,it in (('noclip','it0'), ('clip5','it0'), ('clip5','it1')): r.exact(f'{kind}_{it}_rand_idx', out[it][1])
    return out

def weighted(r, rec, net, drawn):
    "The weighted losses of a step, in the order of the recording"
    rec.draws = drawn
    rec.learn.xb = (rec.x,)
    rec.before_batch()
    rec.learn.out = net(*rec.learn.xb)
    terms = rec.terms()
    order = dict(loss_eqv='equivariance', loss_sc='semantic', loss_rgb='visual', loss_contrastive='contrast')
    return [terms[order[n]] for n in r['loss_names'].tolist()]

def step(r):
    "Two complete training steps: losses to 1e-4, gradients to 2e-3 of the largest, weights to 1e-6"
    drawn,semantic = redrawn(r),r.arrays['loss_names'].tolist().index('loss_sc')
    theirs = r.arrays['noclip_it0_losses_weighted'][semantic]
    fits = lambda s: like(weighted(r, *new_step(r, s)[1::-1], drawn['it0'])[semantic], theirs, 1e-5)
    net,rec,rgb = new_step(r, find_seed(fits, 18))
    lrs = r.arrays['noclip_it0_lr'].tolist()
    opt = torch_opt('sgd', momentum=.9, weight_decay=5e-4)([list(m.parameters()) for m in (net.a, net.b)], lr=lrs[0])
    inputs(r, rec, rgb)
    after = {}
    for kind,it,t in (('noclip','it0',0), ('clip5','it0',0), ('clip5','it1',50_000)):
        one_step(r, net, rec, opt, f'{kind}_{it}', drawn[it], [lr*poly_lr(t) for lr in lrs])
        after[it] = {k:p.detach().clone() for k,p in net.named_parameters()}
    for it in after:
        for k in after[it]:
            held = 'it1' if one_buffer(r, f'it0_after_{k}', f'it1_after_{k}') else it
            r.near(f'{it}_after_{k}', after[held][k], 1e-6)
    r.near('it1_momentum_a_weight', opt.opt.state[net.a.weight]['momentum_buffer'], 2e-3*r.top('it1_momentum_a_weight'))

def inputs(r, rec, rgb):
    "What the networks see, and the colours to reconstruct"
    r.near('img_rec', rgb_to_lab(rgb/255), 2e-3)
    rows = lambda v,name: v[:,:,:r.arrays[name].shape[2]]
    r.near('img_deeplab_head', rows(rgb - torch.tensor(BGR_MEAN)[:,None,None], 'img_deeplab_head'), 1e-4)
    r.near('img_vgg_head', rows((rgb/255-rec.phi.mean)/rec.phi.std, 'img_vgg_head'), 1e-5)

def one_step(r, net, rec, opt, name, drawn, lrs):
    "Losses and gradients; a clipped step changes the weights"
    opt.zero_grad()
    terms,clip = weighted(r, rec, net, drawn),name.startswith('clip')
    sum(terms).backward()
    for i,v in enumerate(terms): r.near(f'{name}_losses_weighted', v, 1e-4*abs(r.arrays[f'{name}_losses_weighted'][i]), at=i)
    if clip: nn.utils.clip_grad_norm_(net.parameters(), 5.)
    for k,p in net.named_parameters(): r.close(f'{name}_grad_{k}', p.grad, 2e-3)
    r.near(f'{name}_lr', lrs, 1e-12)
    if not clip: return
    opt.set_hypers(lr=lrs)
    opt.step()

def data(r):
    "Boxes, crops, complete items, label maps, palette and centres"
    boxes(r)
    items(r)
    fashion(r)
    pascal(r)
    r.near('lr_poly', [1e-5*poly_lr(int(t)) for t in r['lr_iters']], 1e-15)
    r.exact('color_map40', voc_colors(len(r.arrays['color_map40'])))
    r.near('vis_centers', drawing_centers(r.tensor('vis_soft')), 1e-5)

def boxes(r):
    "Jittered, widened and squared boxes, and a crop that leaves the image"
    rng = np.random.RandomState(int(r['perturb_seed']))
    r.near('bbox_perturbed_train', np.stack([jitter_box(b, .05, .05, rng) for b in r['bbox_in']]), 1e-9)
    wide = np.stack([jitter_box(b) for b in r['bbox_in']])
    r.near('bbox_perturbed_test', wide, 1e-9)
    r.near('bbox_square', np.stack([square_box(b) for b in wide]), 1e-9)
    r.near('crop_out', crop_box(r['crop_image'], r['crop_bbox'], 1), 1e-9)
    r.near('crop_resized24', scale_longest(r['crop_out'].astype(float), 24), 1)
    mask = crop_box(r['crop_mask'][...,0], r['crop_bbox'])
    r.near('crop_mask_resized24', scale_longest(mask, 24, nearest=True), 0)

def items(r):
    "Complete items of CUB, with the recorded random draws"
    x1,y1,x2,y2 = r['cub_bbox_1based'] - 1
    image,mask,pts = r['cub_image'],r['cub_mask'],r['cub_parts'].T.astype(float)
    for name in r.find(r'cub_((?:test|train)\d+)_img'):
        train,size = name.startswith('train'),len(r.arrays[f'cub_{name}_img'])
        rng = np.random.RandomState(int(r['perturb_seed']) + int(re.sub(r'\D', '', name)))
        c = instance_crop((x1, y1, x2-x1, y2-y1), image.shape[1::-1], size, .05*train, rng=rng)
        c.flip = bool(train and rng.rand(1)[0] > .5)
        mostly(r, f'cub_{name}_img', np.asarray(c.image(Image.fromarray(image))), 1, .01)
        mostly(r, f'cub_{name}_mask', np.asarray(c.image(Image.fromarray(mask))), 0, .01)
        r.near(f'cub_{name}_kp', normal_points(c, pts, size), 1e-6)

mirrored = [0,1,2,3,4,5,10,11,12,9,6,7,8,13,14] # left and right eye, leg and wing

def normal_points(c, pts, size):
    "Keypoints of pixels from 1, in -1..1 of the crop, as the original counts: pixels from 0, a mirrored x is W-x-1"
    seen = pts[:,2] > 0
    xy = c.points(pts[:,:2]-1)
    if c.flip: xy[:,0] -= 1
    out = np.concatenate([2*xy.astype(float)/size-1, pts[:,2:]], 1)*seen[:,None]
    return out[mirrored] if c.flip else out

def fashion(r):
    "Colours and padding of DeepFashion"
    r.exact('df_colors', np.array(DEEPFASHION_COLORS))
    sums = np.arange(len(r.arrays['df_lut']))
    grey = np.stack([sums//3, (sums+1)//3, (sums+2)//3], -1) # three values of each sum
    r.exact('df_lut', decode_colors(grey[None], compat=True)[0])
    size = len(r.arrays['df_test_img32'])
    mostly(r, 'df_test_img32', pad_square(r['df_image'], size), 1, .01)
    mostly(r, 'df_test_seg32', pad_square(r['df_seg'][...,0], size)[...,None], 0, .01)

def pascal(r):
    "Tight box, share of the image and painted parts of PASCAL-Part"
    mask = r['pp_mask']
    r.exact('pp_bbox2', np.array(tight_box(mask)))
    r.near('pp_pct_area', area_part(tight_box(mask), mask.shape), 1e-9)
    r.exact('pp_dog_names', ['background', *pascal_parts['dog']])
    parts = list(zip(r['pp_part_names'].tolist(), r['pp_part_masks']))
    r.exact('pp_label_map_dog', paint_parts(parts, 'dog', mask.shape))

def evaluation(r):
    "Labels, scores and regressions of the original's evaluation"
    images = list(cub_images(r))
    cub_scores(r, images)
    cub_centers(r, images)
    regression(r)
    tracked(r)
    pixels(r)
    for i in r.find(r'pair(\d+)_a'): pair(r, int(i))

def cub_images(r):
    "Parts and `Batch` of every image, borders cut to multiples of 16"
    at,on,k = 0,0,int(r['num_parts'])
    for (h,w),(lh,lw),pts,box in zip(r['sizes'].tolist(), r['low_sizes'].tolist(), r['landmarks'], r['boxes']):
        logits = r.tensor('lows_flat')[at:at+k*lh*lw].view(1, k, lh, lw)
        mask = r.tensor('fg_flat')[on:on+h*w].view(1, h, w)
        at,on = at+k*lh*lw,on+h*w
        (y,x,nh,nw),kp,b = trim_to_stride(h, w, torch.from_numpy(pts[:,1:]), torch.from_numpy(box[1:]))
        size = torch.tensor([[nh,nw]])
        yield Parts(logits.softmax(1), torch.ones(1, k)),Batch(torch.zeros(1).long(), [''], size, size, None, kp[None,:,:2],
                                                               kp[None,:,2] > 0, b[None], mask[:,y:y+nh,x:x+nw])

def cub_scores(r, images):
    "Names, parts without and with background, and scores; one tie in a thousand may flip"
    c,got = KeypointClusters(compat=True),[]
    for p,b in images:
        c.update(p, b).update(p, b, full=True)
        names,fg = name_points(p, b, compat=True)
        got.append((names, fg-1, name_points(p, b, True, True)[1]))
    for k,v in zip(('cub_gt','cub_pred','cub_pred_bg'), zip(*got)): mostly(r, k, torch.cat(v), 0, .001)
    s = c.result()
    ours = 100*np.array([s[k] for k in ('fg_nmi','fg_ari','nmi','ari','fg_ari_as_printed')])
    r.near('cub_scores_fgnmi_fgari_nmi_ari_and_buggy_fgari', ours, 1e-6)

def cub_centers(r, images):
    "Centres and keypoints relative to the box, of the fitting and the other images"
    rows = []
    for p,b in images:
        hw = b.size[0].tolist()
        q = upsample_logits(p.maps.log(), hw, align=False).softmax(1)*b.mask[:,None]
        rows.append((to_frame(part_centers(q, hw, compat=True), b.box).flatten(1), to_frame(b.keypoints, b.box).flatten(1),
                     b.visible.repeat_interleave(2, 1)))
    n = int(r['n_fit'])
    for split,part in (('fit',rows[:n]), ('eval',rows[n:])):
        for k,v in zip(('centers','annos','masks'), zip(*part)): r.near(f'{split}_{k}', torch.cat(v).float(), 1e-5)

def regression(r):
    "Error of all test images and of three classes"
    a,b = ([r[f'reg_{s}_{k}'] for k in ('pred','gt','visible')] for s in ('train','val'))
    r['reg_train_labels']
    ours = regression_columns(a, b, r['reg_val_labels']-1)
    r.near('reg_error_all_c1_c2_c3', list(ours.values()), 1e-5)

def tracked(r):
    "What the original's training log computes: centres, labels of keypoints, scores"
    kp,mask = r.tensor('tr_kp'),r.tensor('tr_masks').float()
    size = mask.shape[2:]
    logits = upsample_logits(r.tensor('tr_logits_low'), size)
    seen = kp[...,2] > 0
    r['tr_labels']
    r.near('tr_pred', trainer_centers(logits.softmax(1)*mask), 1e-5)
    r.near('tr_gt', (kp[...,:2]+1)/2, 1e-6)
    r.exact('tr_visible', kp[...,2])
    won = logits.argmax(1)
    got = torch.cat([tracked_labels(won[i], kp[i,seen[i],:2], size) for i in range(len(kp))])
    names = seen.nonzero()[:,1]
    mostly(r, 'tr_nmi_pred', got, 0, .001)
    r.exact('tr_nmi_gt', names)
    table = Contingency().update(names, got)
    r.near('tr_nmi_ari', [nmi(table), ari(table)], 1e-6)

def tracked_labels(won, points, size):
    "Part at keypoints in -1..1"
    return at_points(won[None,None], (points+1)/2*torch.tensor([size[1],size[0]]), size)[:,0].long()

def pixels(r):
    "DeepFashion's pixel scores in percent"
    maps,labels,mask = r.tensor('df_logits_low').softmax(1),r.tensor('df_seg')[:,0],r.tensor('df_fg')[:,0]
    full = PixelScores().update(maps, labels, mask, align=False).result()
    fg = PixelScores().update(maps, labels).result()
    r.near('df_full_nmi_ari', [100*full['nmi'], 100*full['ari']], 1e-6)
    r.near('df_fg_nmi_ari', [100*fg['fg_nmi'], 100*fg['fg_ari']], 1e-6)

def pair(r, i):
    "NMI and ARI of two labellings"
    table = Contingency().update(r[f'pair{i}_a'], r[f'pair{i}_b'])
    r.near('pair_nmi_ari_ari_overflow', [nmi(table), ari(table), ari(table)], 1e-6, at=i)

pieces = dict(losses=losses, tps=tps, deeplab=deeplab, unet_vgg=unet_vgg, step=step, data=data, eval=evaluation)
