"Non-parametric prototypes against the numbers of tests/fixtures/parity/nonparametric_prototypes.md, which documents them"
import re

import numpy as np, torch, torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from interp_parts.core import Batch, Parts
from interp_parts.evaluation.areas import Comprehensiveness, Distinctiveness
from interp_parts.nonparametric_prototypes.clustering import PrototypeBank
from interp_parts.nonparametric_prototypes.foreground import batch_foreground
from interp_parts.nonparametric_prototypes.losses import contributions, patch_contrast
from interp_parts.nonparametric_prototypes.model import NonparametricPrototypes
from interp_parts.nonparametric_prototypes.scores import ClassPartScores
from interp_parts.nonparametric_prototypes.assignment import assign_patches, sinkhorn
from interp_parts.nonparametric_prototypes.tokens import TokenBackbone

def recorded(r, prefix):
    "Tensors by name under a prefix"
    return {k:r.tensor(f'{prefix}/{k}') for k in r.find(rf'{prefix}/(.+)')}

class Stub(nn.Module):
    "The recordings' transformer, as `Backbone` would hold it"
    def __init__(self, r, state):
        super().__init__()
        depth,side,patch,dim,heads,registers = r['cfg_depth_side_patch_dim_heads_registers'].tolist()
        self.net = VisionTransformer(img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0,
                                     reg_tokens=registers, no_embed_class=True, init_values=1., dynamic_img_size=True).double()
        self.channels,self.stride = dim,patch
        state = {k:v.double() for k,v in state.items()}
        pos,registers = state.pop('pos_embed'),state.pop('register_tokens')
        state = dict(state, cls_token=state['cls_token']+pos[:,:1], pos_embed=pos[:,1:], reg_token=registers)
        self.net.load_state_dict(state)

def rebuilt(r, prefix, omega, dtype=torch.float64):
    "Our model with the recorded weights"
    c,k = r['cfg_classes_parts'].tolist()
    model = NonparametricPrototypes(c, k, features=Stub(r, recorded(r, prefix)), temperature=r['cfg_temperature'].item(),
                                    compat=True).double()
    with torch.no_grad():
        model.bank.prototypes.copy_(r.tensor('prototypes'))
        model.omega.copy_(r.tensor(omega))
    return model.to(dtype)

def theirs(model, tensors):
    "Our tensors of the appended block by the original's names"
    depth = len(model.backbone.net[0].blocks)
    return {k.replace('backbone.added.0', f'blocks.{depth}'):v for k,v in tensors.items() if 'added.0' in k or k == 'omega'}

def model(r):
    "Tokens, similarities, scores and logits before and after tuning, and maps of the evaluation"
    x,y = r.tensor('x'),r.tensor('y')
    net = rebuilt(r, 'p', 'omega').eval()
    own = theirs(net, dict(net.named_parameters()))
    r.exact('learnable', np.array([k for k in own if k != 'omega']))
    zero = [k for k,v in own.items() if k != 'omega' and not v.any()]
    r.exact('zeroed', np.array(zero))
    for stage in ('start','tuned'):
        if stage == 'tuned':
            with torch.no_grad():
                for k,v in recorded(r, 'tuned').items(): own[k].copy_(v)
        outputs(r, stage, net, x, y)

@torch.no_grad()
def outputs(r, stage, net, x, y):
    "Everything that a forward pass gives: float64, and the maps in float32"
    hidden,_ = net.backbone.encode(x.double())
    raw,tuned = net.backbone.tokens(hidden)
    if stage == 'start': assert torch.equal(raw, tuned)
    r.close(f'{stage}_raw_tokens', raw, 1e-6)
    r.close(f'{stage}_tuned_tokens', tuned, 1e-6)
    o = net(x.double())
    r.near(f'{stage}_patch_scores', o.similarity, 1e-6)
    r.near(f'{stage}_image_scores', o.scores, 1e-9)
    r.close(f'{stage}_logits', o.logits, 1e-9)
    maps = o.similarity.transpose(1,2)[:,:-1].permute(0,1,3,2).flatten(1,2).unflatten(2, o.grid)
    r.near(f'{stage}_pooled', ClassPartScores.pooled(maps), 1e-6)
    single = net.float()
    o = single(x)
    own = o.similarity[torch.arange(len(y)),:,y].transpose(1,2).unflatten(2, o.grid)
    r.near(f'{stage}_class_maps', own, 2e-5)
    r.near(f'{stage}_class_maps_pooled', ClassPartScores.pooled(own), 2e-5)
    net.double()

def expansion(r):
    "Names, sources and trained tensors of expanded networks"
    for c in r.find(r'(\w+)_keys'):
        if c.endswith('original'): continue
        depth,splits,blocks = r[f'{c}_depth_splits_blocks'].tolist()
        plan = TokenBackbone.expansion_plan(depth, splits)
        assert len(plan) == blocks
        keys,sources,learnable = named(r[f'{c}_original_keys'].tolist(), plan)
        r.exact(f'{c}_keys', np.array(keys))
        r.exact(f'{c}_sources', np.array(sources))
        r.exact(f'{c}_learnable', np.array(learnable))

def named(keys, plan):
    "The original's names of the expanded network, with the name each value comes from ('' is zero), sorted"
    rows = [(k, k, False) for k in keys if not k.startswith('blocks.')]
    for n,(i,new) in enumerate(plan):
        for k in keys:
            if not k.startswith(f'blocks.{i}.'): continue
            rest = k.split('.', 2)[2]
            zero = new and re.fullmatch(r'(attn\.proj|mlp\.fc2)\.(weight|bias)', rest)
            rows.append((f'blocks.{n}.{rest}', '' if zero else k, new))
    return zip(*sorted(rows))

def foreground(r):
    "First left singular vector of a batch, and the pseudo labels"
    for c in r.find(r'(\w+)_tokens'):
        z,y,bg,u = r.tensor(f'{c}_tokens'),r.tensor(f'{c}_y'),int(r[f'{c}_background_class']),r.tensor(f'{c}_u')
        sign = 1 if (batch_foreground(z)[0]*u).sum() > 0 else -1
        ours,_ = batch_foreground(z, sign)
        r.near(f'{c}_u', ours, 1e-5)
        flip = -sign if str(r[f'{c}_compare']) == 'ge' else sign # u >= 0.5 is u <= 0.5 of the other direction
        on = batch_foreground(z, flip)[1]
        grid = r.arrays[f'{c}_pseudo_labels'].shape[1:]
        r.exact(f'{c}_pseudo_labels', torch.where(on, y[:,None], bg).unflatten(1, grid))

def sinkhorns(r):
    "Shares and assignments"
    for c in r.find(r'(\w+)_similarity'):
        q = sinkhorn(r.tensor(f'{c}_similarity'))
        r.near(f'{c}_shares', q, 1e-4)
        r.exact(f'{c}_index', q.argmax(1))
        r.exact(f'{c}_one_hot', F.one_hot(q.argmax(1), q.shape[1]).to(torch.uint8))

def clustering(r):
    "Batches of the first stage, and an update with few patches"
    c,k = r['cfg_classes_parts'].tolist()
    gamma = r['cfg_gamma'].item()
    bank = PrototypeBank(c, k, r['prototypes0'].shape[2])
    bank.prototypes.copy_(r.tensor('prototypes0'))
    for b in sorted(r.find(r'(b\d+)_raw_tokens')):
        raw,y = F.normalize(r.tensor(f'{b}_raw_tokens'), dim=2),r.tensor(f'{b}_y')
        labels = r.tensor(f'{b}_pseudo_labels')
        assert ((labels == y[:,None,None]) | (labels == c)).all()
        moved(r, b, bank, raw, bank(r.tensor(f'{b}_tuned_tokens')), labels, gamma, f'{b}_prototypes')
    bank.prototypes.copy_(r.tensor('few_prototypes_before'))
    raw = F.normalize(r.tensor('few_tokens'), dim=2)
    moved(r, 'few', bank, raw, bank(raw), r.tensor('few_pseudo_labels'), gamma, 'few_prototypes')

def moved(r, b, bank, raw, similarity, labels, gamma, after):
    if f'{b}_patch_scores' in r: r.near(f'{b}_patch_scores', similarity, 1e-5)
    at = assign_patches(similarity.flatten(0,1), labels.flatten())
    r.exact(f'{b}_assignment', at.view(raw.shape[:2]))
    old = bank.prototypes.clone()
    bank.update(raw.flatten(0,1), at, gamma)
    absent = [c for c in range(len(old)) if not (labels == c).any()]
    assert torch.equal(bank.prototypes[absent], old[absent])
    r.close(after, bank.prototypes, 1e-5)

def losses(r):
    "Class loss, contrast of patches, their sum and its gradients; logits of scores"
    weight,temperature,background = r['cfg_weight_temperature_background'].tolist()
    c,k = r['cfg_classes_parts'].tolist()
    for case in r.find(r'(\w+)_class_ppd_total'):
        s,l = (r.tensor(f'{case}_{n}').requires_grad_() for n in ('patch_scores','logits'))
        assert s.shape[2:] == (c+1,k)
        ce = F.cross_entropy(l, r.tensor(f'{case}_y'))
        ppd,_ = patch_contrast(s, r.tensor(f'{case}_assignment'), temperature, background)
        total = ce + weight*ppd
        total.backward()
        r.close(f'{case}_class_ppd_total', torch.stack([ce, ppd, total]), 1e-5)
        r.close(f'{case}_grad_patch_scores', s.grad, 1e-5)
        r.close(f'{case}_grad_logits', l.grad, 1e-5)
    scores = r.tensor('aggregate_scores')
    r.close('aggregate_start', contributions(scores, torch.full(scores.shape[1:], .5)).sum(2), 1e-5)
    r.close('aggregate_out', contributions(scores, r.tensor('aggregate_omega')).sum(2), 1e-5)

def step(r):
    "Two steps of the second stage in float64"
    net = rebuilt(r, 'p0', 'omega0').train()
    own = theirs(net, dict(net.named_parameters()))
    lrs = r['cfg_lr_block_omega'].tolist()
    block = [v for k,v in own.items() if k != 'omega']
    opt = torch.optim.Adam([dict(params=block, lr=lrs[0]), dict(params=[net.omega], lr=lrs[1])])
    for e in sorted(r.find(r'(s\d+)_x')):
        x,y,labels = r.tensor(f'{e}_x').double(),r.tensor(f'{e}_y'),r.tensor(f'{e}_pseudo_labels')
        assert ((labels == y[:,None,None]) | (labels == len(net.omega))).all()
        o = net(x)
        at = assign_patches(net.bank(o.raw).flatten(0,1), labels.flatten())
        r.exact(f'{e}_assignment', at.view(o.raw.shape[:2]))
        r.close(f'{e}_logits', o.logits, 1e-7)
        ce = F.cross_entropy(o.logits, y)
        ppd,_ = patch_contrast(o.similarity, at.view(o.raw.shape[:2]), background=np.float32(.1).item())
        r.close(f'{e}_class_ppd', torch.stack([ce, ppd]), 1e-6)
        opt.zero_grad()
        (ce + .8*ppd).backward()
        if e == 's0': gradients(r, own)
        opt.step()
    for k in r.find(r'p2/(.+)'): r.near(f'p2/{k}', own[k], .02*lrs[k == 'omega'])

def gradients(r, own):
    for k in r.find(r'g0/(.+)'): r.close(f'g0/{k}', own[k].grad, 1e-6, 1e-12)

def evaluation(r):
    "Consistency, stability, distinctiveness and comprehensiveness as published"
    c,k,half,box = r['cfg_classes_parts_half_size_box'].tolist()
    share,threshold = r['cfg_part_threshold_map_threshold'].tolist()
    y,keypoints,boxes = r.tensor('y'),r.tensor('keypoints'),r.tensor('boxes')
    clean,noisy = (r.tensor(f'activations_{n}').unflatten(1, (c,k))[torch.arange(len(y)),y] for n in ('clean','noisy'))
    scores = ClassPartScores(half, share)
    scores.update(y, clean, noisy, keypoints, boxes)
    for n,v in zip(('hits_clean','hits_noisy','visible'), scores.tables()): r.exact(n, v.to(torch.uint8))
    res = scores.result()
    r.near('consistency', 100*res['class_consistency'], 1e-9)
    r.near('stability', np.float32(100*res['class_stability']), 1e-4)
    areas(r, clean, box, threshold)
    for i in r.find(r'segmentation(\d+)'):
        mask = ClassPartScores.mask(r.tensor(f'segmentation{i}'), r['segmentation_boxes'][int(i)].tolist(), 224)
        r.exact('segmentation_masks', mask.to(torch.uint8), at=int(i))

def areas(r, clean, box, threshold):
    "Distinctiveness and comprehensiveness: of each image, and of all"
    n = len(clean)
    size = torch.tensor([[224,224]])
    parts,mask = Parts(clean, clean.amax((2,3))),r.tensor('masks') > 0
    at = lambda i: Batch(torch.tensor([i]), [''], size, size, mask=mask[i:i+1])
    each = lambda make,name: [make().update(parts[i], at(i)).result()[name] for i in range(n)]
    iou = 1 - np.array(each(lambda: Distinctiveness(side=box/224), 'distinctiveness'))
    r.near('box_iou', iou, 1e-5)
    r.near('distinctiveness', 1 - iou.mean(), 1e-5)
    covered = np.array(each(lambda: Comprehensiveness(threshold=threshold), 'comprehensiveness'))
    r.near('map_iou', covered, 1e-3)
    r.near('comprehensiveness', covered.mean(), 1e-3)

pieces = dict(model=model, expansion=expansion, foreground=foreground, sinkhorn=sinkhorns, clustering=clustering, losses=losses,
              step=step, eval=evaluation)
