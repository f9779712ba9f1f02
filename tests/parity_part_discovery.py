"Part discovery against the numbers of tests/fixtures/parity/part_discovery.md, which documents arrays and tolerances"
import numpy as np, torch, torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from interp_parts.core import Batch, Parts
from interp_parts.evaluation.active_parts import ActiveKeypointError, ActiveRegression, ForegroundIoU
from interp_parts.evaluation.clustering import Contingency, ari, nmi
from interp_parts.evaluation.landmarks import eye_frame, to_frame
from interp_parts.evaluation.pixels import parts_at, upsample
from interp_parts.evaluation.regression import keypoint_error
from interp_parts.part_discovery.assignment import part_distances
from interp_parts.part_discovery.equivariance import Move, published_back, second_look_loss
from interp_parts.part_discovery.losses import _border, total_variation
from interp_parts.part_discovery.model import PartDiscovery
from interp_parts.part_discovery.step import HalveRates, map_terms

class ConvNet(nn.Module):
    "The recorded stub: `layer3` and `layer4` of one 1x1 convolution each, joined"
    def __init__(self, state, net):
        super().__init__()
        c = state['conv1.weight']
        o3,i3 = state['layer3.weight'].shape[:2]
        o4,i4 = state['layer4.1.weight'].shape[:2]
        stride,padding,self.pool = (4,2,4) if net else (2,1,2)
        self.conv1 = nn.Conv2d(3, len(c), c.shape[2], stride, padding)
        self.layer3 = nn.Conv2d(i3, o3, 1)
        self.layer4 = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(o3, o4, 1, groups=o3//i4))
        self.channels,self.align = o3+o4,net

    def stages(self, x):
        l3 = self.layer3(F.avg_pool2d(self.conv1(x).relu(), self.pool))
        return l3,self.layer4(l3)

    def forward(self, x):
        l3,l4 = self.stages(x)
        return torch.cat([F.interpolate(l4, l3.shape[2:], mode='bilinear', align_corners=self.align), l3], 1)

class Transformer(VisionTransformer):
    "The recorded transformer: patch tokens after the last norm as a map"
    def __init__(self, h, w, patch, dim, depth, heads, registers):
        super().__init__((h,w), patch, embed_dim=dim, depth=depth, num_heads=heads, reg_tokens=registers,
                         no_embed_class=True, init_values=1e-5, num_classes=0)
        self.channels = dim

    def forward(self, x): return self.forward_features(x)[:,self.num_prefix_tokens:].transpose(1,2).unflatten(2, self.patch_embed.grid_size)

def network(r, state):
    "Our model with the recorded architecture and parameters, in float64 and evaluation mode"
    (k,c),p = r['cfg_parts_classes'].tolist(),float(r['cfg_dropout'])
    net,vit = 'conv1.weight' in state and state['conv1.weight'].shape[2] == 5,'pos_embed' in state
    features = Transformer(*r['cfg_height_width_patch_dim_depth_heads_registers'].tolist()) if vit else ConvNet(state, net)
    model = PartDiscovery(c, k, design='paper', modulation='layer_norm' if vit else 'weights', dropout=p, features=features)
    return model.load_original(state).double().eval(),net,vit

def images(r, name):
    "Recorded images, float64"
    return r.tensor(f'{name}_uint8').double()/255 if f'{name}_uint8' in r else r.tensor(name).double()

def model(r):
    "Outputs in evaluation and training mode, gradients, and the same in float32"
    state = {k:r.tensor(f'p/{k}') for k in r.find('p/(.+)')}
    m,net,vit = network(r, state)
    x = images(r, 'x')
    f = m.features(x)
    if net: stages(r, m, x)
    if 'plain_maps' in r: outputs(r, m, m.vote(f, m.assign(f)), 'plain')
    noise = r.tensor('eval_noise').double() if vit else None
    out = m.vote(f, m.assign(f, noise))
    outputs(r, m, out, 'eval')
    r.near('eval_part_features', out.vectors, 1e-6 if net else 1e-9*r.top('eval_part_features'))
    if not net: further(r, m, f, out)
    gradients(r, m, out, net, vit)
    training(r, m, f, vit)
    single(r, m.float(), x.float(), vit)

def outputs(r, m, out, stage):
    "Maps, votes and logits; PDiscoNet's votes have a column of the background"
    wide = r.arrays[f'{stage}_scores'].shape[2] > m.n_parts
    if f'{stage}_maps' in r: r.near(f'{stage}_maps', out.maps, 1e-9)
    r.close(f'{stage}_scores', m.head.weight@out.modulated if wide else out.scores, 1e-9)
    r.close(f'{stage}_logits', out.logits, 1e-9)

def stages(r, m, x):
    l3,l4 = m.backbone.stages(x)
    r.near('layer3_head', l3[:,:4], 1e-6)
    r.near('layer4_head', l4[:,:4], 1e-6)

def further(r, m, f, out):
    r.close('eval_features', f, 1e-9)
    r.close('eval_modulated', out.modulated, 1e-9)
    r.close('eval_dist', part_distances(f, m.prototypes.flatten(1)), 1e-9)

def gradients(r, m, out, net, vit):
    "Of the recorded combination of maps, logits and part vectors"
    cot = {k:r.tensor(f'cot_{k}').double() for k in r.find('cot_(.+)')}
    vectors = out.modulated if vit else out.vectors
    total = (out.maps*cot['maps']).sum() + (out.logits*cot['logits']).sum()
    total = total + (vectors*cot['part_features' if net else 'returned_features']).sum()
    m.zero_grad()
    total.backward()
    grads = m.original_views({k:p.grad for k,p in m.named_parameters()})
    for k in r.find('g/(.+)'): r.close(f'g/{k}', grads[k], 1e-6, 1e-12)

def training(r, m, f, vit):
    "With the recorded dropout and noise"
    noise = r.tensor('train_noise').double() if vit else None
    keep = r.tensor('train_keep').double()[:,None]/(1-m.dropout)
    out = m.vote(f, m.assign(f, noise), keep[...,:m.n_parts])
    if 'train_maps' in r: r.near('train_maps', out.maps, 1e-9)
    wide = keep.shape[2] > m.n_parts
    r.close('train_scores', m.head.weight@(out.modulated*keep) if wide else out.scores, 1e-9)
    r.close('train_logits', out.logits, 1e-9)

def single(r, m, x, vit):
    "Float32"
    f = m.features(x)
    out = m.vote(f, m.assign(f, r.tensor('eval32_noise') if vit else None))
    r.near('eval32_maps', out.maps, 5e-4)
    r.close('eval32_logits', out.logits, 1e-3)

class Described:
    "Maps and vectors as the model returns them"
    def __init__(self, maps, vectors): self.maps,self.vectors,self.modulated = maps,vectors,vectors

names = dict(tv='total_variation')

def losses(r):
    "Every loss and its gradient in every case"
    for case in r.find('(.+)_z'): loss_case(r, case)
    if 'rand_background_mask' in r:
        r.near('rand_background_mask', _border(*r.arrays['rand_background_mask'].shape), 1e-6)
    if 'tv_first_maps' in r: variations(r)

def variations(r):
    "Total variation of two batches, divided as published and as it should be"
    a,b = (r.tensor(f'tv_{k}_maps').double() for k in ('first','second'))
    cells = len(a)*a[0,0].numel()
    r.near('tv_published', torch.stack([total_variation(v, cells) for v in (a,b)]), 1e-12)
    r.near('tv_actual', torch.stack([total_variation(v) for v in (a,b)]), 1e-12)

def loss_values(r, case, dtype):
    "Losses by recorded name, and what they are of"
    z = r.tensor(f'{case}_z').to(dtype).requires_grad_()
    maps = z.softmax(1)
    v,s = (r.tensor(f'{case}_{k}').to(dtype).requires_grad_() for k in ('part_features','scores'))
    y,k = r.tensor(f'{case}_y').long(),maps.shape[1]-1
    terms = r['terms'].tolist()
    prior = 'tv' if 'tv' in terms else 'concentration'
    fs = map_terms(Described(maps, v), prior, compat=True)
    value = {t:F.cross_entropy(s[...,:k].mean(2), y) if t == 'classification' else fs[names.get(t, t)]() for t in terms}
    return value,dict(classification=s, orthogonality=v, entropy=z, maps=maps, z=z)

def loss_case(r, case):
    for suffix,dtype,tol in (('',torch.float64,2e-6), ('32',torch.float32,1e-5)):
        value,of = loss_values(r, case, dtype)
        name,theirs = f'{case}_values{suffix}',r.arrays[f'{case}_values{suffix}']
        for i,(t,v) in enumerate(value.items()):
            if theirs[i] != -1: r.near(name, v.detach(), tol, at=i)
            else: r.near(name, -1. if torch.isfinite(v) else v.detach(), tol, at=i) # theirs is NaN, ours is not
        if not suffix: loss_gradients(r, case, value, of)

def loss_gradients(r, case, value, of):
    "Of each loss, and of the weighted sum"
    grad = lambda v,x: torch.autograd.grad(v, x, retain_graph=True, allow_unused=True)[0]
    for t in r.find(f'{case}_grad_(.+)'): r.close(f'{case}_grad_{t}', grad(value[t], of.get(t, of['maps'])), 1e-6, 1e-12)
    if f'{case}_dz_background' in r: r.close(f'{case}_dz_background', grad(value['background'], of['z']), 1e-6, 1e-12)
    if f'{case}_total' not in r: return
    total = sum(w*v for w,v in zip(r['weights'].tolist(), value.values()) if w)
    r.close(f'{case}_total', total.detach(), 1e-6)
    r.close(f'{case}_dz_total', grad(total, of['z']), 1e-6, 1e-12)

def equivariance(r):
    "Moved images, maps moved back as published, the loss and its gradients"
    for c in r.find(r'(c\d+)_x_uint8'):
        angle,scale = float(r[f'{c}_angle']),float(r[f'{c}_scale'])
        shift = r.tensor(f'{c}_translate').float()
        x = images(r, f'{c}_x')
        r.near(f'{c}_warped', Move(torch.tensor([angle]), torch.tensor([scale]), shift[None])(x), 1e-5)
        maps,other = (r.tensor(f'{c}_{k}').double().requires_grad_() for k in ('maps','maps_warped'))
        back = published_back(other, angle, scale, shift.tolist(), x.shape[3])
        loss = second_look_loss(maps, back)
        r.near(f'{c}_undone', back, 1e-9)
        r.near(f'{c}_loss', loss.detach(), 1e-9)
        for k,g in zip(('maps','maps_warped'), torch.autograd.grad(loss, (maps,other))):
            r.close(f'{c}_grad_{k}', g, 1e-8, 1e-12)

named = dict(conc='concentration', orth='orthogonality', tv='total_variation', enforced_presence='background',
             pixel_wise_entropy='entropy', presence='presence', concentration='concentration', orthogonality='orthogonality')

def step(r):
    "Two optimiser steps, dropout, noise and moves as recorded"
    state = {k:r.tensor(f'p0/{k}') for k in r.find('p0/(.+)')}
    m,net,vit = network(r, state)
    ps = m.original_views(dict(m.named_parameters()))
    if 'trained' in r:
        trained = r['trained'].tolist()
        for k,p in ps.items(): p.requires_grad_(k in trained)
    opt = optimiser(r, ps)
    for e in (0,1):
        m.zero_grad()
        out = recorded_step(r, m, e, net, vit)
        if e == 0:
            for k in r.find('g0/(.+)'): r.close(f'g0/{k}', ps[k].grad, 1e-5, 1e-12)
        clip(r, m, e)
        if f's{e}_logits' in r: r.close(f's{e}_logits', out.logits.detach(), 1e-7)
        opt.step()
    rates = {id(p):g['lr'] for g in opt.param_groups for p in g['params']}
    for k in r.find('p2/(.+)'): r.near(f'p2/{k}', ps[k], .02*rates.get(id(ps[k]), 0.))
    every = 5 if net else 4
    r.near('schedule', [HalveRates(every).factor(e) for e in range(len(r.arrays['schedule']))], 1e-12)

def optimiser(r, ps):
    "Adam with the recorded learning rates"
    if 'cfg_lr_modulation_classifier_rest' in r:
        modulation,classifier,rest = r['cfg_lr_modulation_classifier_rest'].tolist()
        tokens = prototypes = rest
    else: tokens,prototypes,modulation,classifier = r['cfg_lr_tokens_prototypes_modulation_classifier'].tolist()
    rate = lambda k: modulation if k.startswith('modulation') else classifier if 'class' in k else prototypes if 'landmarks' in k else tokens
    rate_of = lambda k: tokens if k in ('cls_token','reg_token','pos_embed') else rate(k)
    return torch.optim.Adam([dict(params=[p], lr=rate_of(k)) for k,p in ps.items() if p.requires_grad], eps=1e-8)

def clip(r, m, e):
    if 'cfg_clip' not in r: return
    norm = nn.utils.clip_grad_norm_([p for p in m.parameters() if p.grad is not None], float(r['cfg_clip']))
    r.close(f's{e}_grad_norm', norm, 1e-6)

def recorded_step(r, m, e, net, vit):
    "Losses and gradients of one step"
    x,y = images(r, f's{e}_x'),r.tensor(f's{e}_y').long()
    noise = (lambda k: r.tensor(f's{e}_{k}').double()) if vit else (lambda k: None)
    angle,scale,shift = float(r[f's{e}_angle']),float(r[f's{e}_scale']),r.tensor(f's{e}_translate').float()
    f = m.features(x)
    keep = r.tensor(f's{e}_keep').double()[:,None]/(1-m.dropout)
    out = m.vote(f, m.assign(f, noise('noise')), keep[...,:m.n_parts])
    again = Move(torch.tensor([angle]), torch.tensor([scale]), shift[None])(x)
    other = m.assign(m.features(again), noise('noise_warped'))
    fs = map_terms(out, 'concentration' if net else 'tv', compat=True)
    value = {k:fs[named[k]]() for k in r.arrays['loss_names'].tolist() if k in named}
    value['equiv'] = value['equivariance'] = second_look_loss(out.maps, published_back(other, angle, scale, shift.tolist(), x.shape[3]))
    value['classification'] = F.cross_entropy(out.logits, y)
    weights = dict(classification=2., concentration=1000., presence=1., orthogonality=1., equivariance=1.) if net else \
        dict(classification=1., conc=0., presence=1., orth=1., equiv=1., tv=1., enforced_presence=2., pixel_wise_entropy=1.)
    terms = {k:w*value[k] for k,w in weights.items()}
    total = sum(v for k,v in terms.items() if weights[k])
    total.backward()
    shown = dict(terms, total=total)
    r.close(f's{e}_losses', torch.stack([shown[k].detach() for k in r['loss_names'].tolist()]), 1e-6)
    return out

def percent(table): return np.array([100*nmi(table), 100*ari(table)])

def at_keypoints(maps, points, visible, size):
    "Keypoint numbers and the parts that win there, image by image"
    name = visible.bool().nonzero()[:,1]
    scores = parts_at(maps, points, size)[visible.bool()]
    return name,scores.max(1).indices

def eval_cub(r):
    "Keypoints, boxes and maps of each image; cropped first for PDiscoFormer"
    k = int(r['cfg_parts'])
    (fit,_),(test,found) = (cub_split(r, s, k) for s in ('fit','eval'))
    label,pred = (torch.cat(v) for v in zip(*found))
    r.exact('labels', label)
    r.exact('predictions', pred)
    r.near('nmi_ari', percent(Contingency().update(label, pred)), 1e-6)
    regression(r, fit, test)

def regression(r, fit, test):
    (c0,p0,v0,a0),(c,p,v,a) = fit,test
    pred = ActiveRegression().fit(c0, p0, v0, a0).predict(c, a)
    r.near('regression_error', 100*keypoint_error(pred, p, v), 1e-3)

def cub_split(r, s, k):
    "Centres, keypoints, visibility and activity of a split, compared; and which parts its keypoints fall into"
    sizes,maps,points,boxes = cub_images(r, s, k)
    rows,found = [],[]
    for hw,m,pts,box in zip(sizes, maps, points, boxes):
        size,xy,seen = hw[None],pts[None,:,1:3].double(),pts[None,:,3]
        frame = box[None,1:].double()
        rows.append((to_frame(ActiveKeypointError.centroids(m[None,:-1], size), frame), to_frame(xy, frame), seen, ActiveKeypointError.active(m[None,:-1])))
        found.append(at_keypoints(m[None], xy, seen, size))
    c,p,v,a = (torch.cat(o) for o in zip(*rows))
    r.near(f'{s}_centers', c.flatten(1), 1e-5)
    r.near(f'{s}_annotations', p.flatten(1), 1e-5)
    r.exact(f'{s}_masks', as_kind(r, f'{s}_masks', v.repeat_interleave(2, 1)))
    r.exact(f'{s}_active', as_kind(r, f'{s}_active', a.repeat_interleave(2, 1)))
    return (c,p,v,a),found

def as_kind(r, name, v): return v.numpy().astype(r.arrays[name].dtype)

def cub_images(r, s, k):
    "Sizes, maps, keypoints (id, x, y, visible) and boxes (id, x, y, w, h) of a split"
    sizes,points,boxes = (r.tensor(f'{s}_{n}') for n in ('sizes','landmarks','boxes'))
    if 'cfg_side' in r: return cropped(r, s, sizes, points, boxes)
    flat,maps,at = r.tensor(f'{s}_maps_flat'),[],0
    for h,w in r[f'{s}_map_sizes'].tolist():
        maps.append(flat[at:at+(k+1)*h*w].view(k+1, h, w))
        at += (k+1)*h*w
    return sizes,maps,points,boxes

def cropped(r, s, sizes, points, boxes):
    "What the centre crop leaves: keypoints strictly outside are hidden and put on its border, boxes move and keep their sides"
    side = int(r['cfg_side'])
    at = ((sizes-side).double()/2).round().flip(1) # x, y
    points,boxes = points.double(),boxes.double()
    moved_to = points[...,1:3] - at[:,None]
    out = (points[...,3] == 0) | (moved_to < 0).any(2) | (moved_to > side).any(2)
    points[...,1:3] = moved_to.clamp(0, side)
    points[...,3][out] = 0
    boxes[:,1:3] = (boxes[:,1:3] - at).clamp(min=0)
    r.near(f'{s}_landmarks_cropped', points, 1e-4)
    r.near(f'{s}_boxes_cropped', boxes, 1e-4)
    return torch.full_like(sizes, side),list(r.tensor(f'{s}_maps')),points,boxes

def eval_celeba(r):
    "Landmarks in eye distances; centres are stacked row, then column"
    size = r.tensor('cfg_height_width')[None]
    (fit,_),(test,found) = (celeba_split(r, s, size) for s in ('fit','eval'))
    r.exact('labels', found[0])
    r.exact('predictions', found[1])
    r.near('nmi_ari', percent(Contingency().update(*found)), 1e-6)
    regression(r, fit, test)

def celeba_split(r, s, size):
    maps,points = r.tensor(f'{s}_maps'),r.tensor(f'{s}_landmarks').double()
    size = size.expand(len(maps), 2)
    centers,seen,active = ActiveKeypointError.centroids(maps[:,:-1], size),torch.ones(points.shape[:2]),ActiveKeypointError.active(maps[:,:-1])
    frame = eye_frame(points)
    r.near(f'{s}_centers', centers.flip(2).flatten(1), 1e-4)
    r.near(f'{s}_annotations', points.flatten(1), 1e-5)
    r.near(f'{s}_eye_distance', frame[:,2:3], 1e-4)
    r.exact(f'{s}_active', as_kind(r, f'{s}_active', active.repeat_interleave(2, 1)))
    int(r['cfg_parts'])
    return (to_frame(centers, frame),to_frame(points, frame),seen,active),at_keypoints(maps, points, seen, size)

def eval_pixels(r):
    "Pixels of all images: masks and a constant 0.1 against the maps"
    maps,masks = r.tensor('maps'),r.tensor('masks').float()
    label = torch.cat([masks, torch.full_like(masks[:,:1], .1)], 1).max(1).indices
    pred = upsample(maps, masks.shape[2:]).max(1).indices
    r.exact('labels', label)
    r.exact('predictions', pred)
    r.near('nmi_ari', percent(Contingency().update(label, pred)), 1e-6)

def eval_foreground(r):
    "Intersection over union of foreground and background"
    maps,masks = r.tensor('maps'),r.tensor('masks')
    n = len(maps)
    batch = Batch(torch.arange(n), ['']*n, torch.tensor([masks.shape[1:]]).expand(n, 2), torch.tensor([masks.shape[1:]]).expand(n, 2), mask=masks > 0)
    got = ForegroundIoU().update(Parts(maps, ActiveKeypointError.active(maps).float(), background=maps.shape[1]-1), batch).result()
    r.near('iou_foreground_background', [got['foreground_iou'],got['background_iou']], 1e-6)

pieces = dict(model=model, losses=losses, equivariance=equivariance, step=step, eval_pdisconet=eval_cub,
              eval_pdiscoformer=eval_cub, eval_celeba=eval_celeba, eval_pixels=eval_pixels, eval_foreground=eval_foreground)
