"Activation diversity against the numbers of tests/fixtures/parity/activation_diversity.md, which documents them"
import math

import numpy as np, torch
from torch import nn

from interp_parts.activation_diversity.model import ActivationDiversity
from interp_parts.activation_diversity.network import casia_net, _SameConv2d, _legacy_upsample
from interp_parts.activation_diversity.losses import filter_diversity, response_diversity
from interp_parts.evaluation.recognition import Identification, Verification
from interp_parts.evaluation.face_templates import Templates
from interp_parts.activation_diversity.peaks import Peaks, average_locations
from interp_parts.activation_diversity.identity import IdentityLoss
from interp_parts.activation_diversity.mesh import FaceMesh
from interp_parts.training.optim import optimizers
from interp_parts.activation_diversity.occlusion import _fill_polygons, _warp_windows

KEPT = 260 # channels that the original's FAD keeps, whatever the width
EDGE = 46  # pixels of the outline of one window, which rounding may move

def nchw(a): return torch.from_numpy(np.ascontiguousarray(a)).permute(0,3,1,2).contiguous()
def nhwc(t): return t.detach().permute(0,2,3,1)

class Trunk(nn.Module):
    "The trunk with the recorded widths"
    def __init__(self, width, top):
        super().__init__()
        self.net = casia_net(width=width, top=top)
        self.channels = [f['num_chs'] for f in self.net.feature_info[2:]]

    def forward(self, x): return self.net.forward_intermediates(x, indices=[2,3,4], intermediates_only=True)

class RecordedDropout(nn.Module):
    "Dropout with the recorded masks, clean first"
    def __init__(self, masks, keep):
        super().__init__()
        self.masks = [m.double()/keep for m in masks]
        self.turn,self.seen = 0,[]

    def forward(self, f):
        self.seen.append(f*self.masks[self.turn])
        self.turn += 1
        return self.seen[-1]

def generated(names, shapes, seed):
    "The parameters that the recording used"
    rs,out = np.random.RandomState(seed),{}
    for n in sorted(names):
        z = rs.standard_normal(shapes[n])
        rules = (n.endswith('/w'), z/math.sqrt(np.prod(z.shape[:3]))), (n.endswith('Matrix'), .5*z), \
                (n.endswith('gamma'), 1+.1*z), (n.endswith('moving_variance'), np.abs(1+.2*z)+.1), (True, .1*z)
        out[n] = next(v for rule,v in rules if rule).astype(np.float32)
    return out

def images(r):
    "Images, occluded copies and labels: stored, or by the documented recipe"
    labels = r['labels']
    if 'x' in r: return r['x'],r['x_occ'],labels
    b,s = int(r['batch']),int(r['size'])
    rs = np.random.RandomState(int(r['seed'])+50)
    x = (rs.randint(0, 256, (b,s,s,3)).astype(np.float32)/127.5-1).astype(np.float32)
    occ = x.copy()
    for i in range(b):
        y0,x0 = rs.randint(2, s-s//6-2),rs.randint(2, s-s//3-2)
        occ[i,y0:y0+s//6,x0:x0+s//3] = -1
    return x,occ,labels

def recorded_model(r):
    "Our model with the recorded parameters, which are checked"
    top,dfc = int(r['gfc_dim']),int(r['dfc_dim'])
    model = ActivationDiversity(int(r['subjects']), features=Trunk(int(r['df_dim']), top), filters=dfc, stable=KEPT)
    shapes = {k:tuple(v.shape) for k,v in model.original_views().items()}
    r.exact('param_names', sorted(shapes))
    state = generated(shapes, shapes, int(r['seed']))
    for name,f in (('param_sum', lambda v: v.astype(np.float64).sum()),
                   ('param_abs_sum', lambda v: np.abs(v.astype(np.float64)).sum())):
        if name in r: r.close(name, np.array([f(state[k]) for k in sorted(state)]), 1e-6)
    if 'param_first' in r: r.exact('param_first', np.array([state[k].flat[0] for k in sorted(state)]))
    model.load_original(state)
    return model

def net(r):
    "The whole network: features, maps, losses and gradients of one step"
    # in float32 a response may change places with its threshold; the recording agrees with float64
    model = recorded_model(r).double()
    x,occ,labels = images(r)
    x,occ = nchw(x).double().requires_grad_(),nchw(occ).double().requires_grad_()
    for k in ('batch','size'): r[k]
    if 'x_sum' in r: r.close('x_sum', torch.stack([v.detach().double().sum() for v in (x,occ)]), 1e-6)
    tested(r, model.eval(), x.detach())
    drop = model.drop = RecordedDropout([r.tensor(f'dropout_mask_{k}') for k in ('clean','occ')],
                                        float(r['dropout_keep_prob']))
    out = model.train()(x, occ)
    features(r, out, drop.seen)
    losses(r, model, out, torch.from_numpy(labels).long()).backward()
    gradients(r, model, x, occ)

@torch.no_grad()
def tested(r, model, x):
    "The first image in inference mode"
    o = model(x[:1])
    r.close('out_test_feature', o.embedding, 1e-5)
    if 'out_test_k5' in r: r.close('out_test_k5', nhwc(o.maps), 1e-5)

def features(r, o, dropped):
    "Descriptors, maps, changes and masks in training mode"
    c = o.covered
    got = dict(k6=o.embedding, k6_dropped=dropped[0], k6_occ_masked=c.embedding*o.mask, k6_occ_dropped=dropped[1],
               k6_change_mean=(o.embedding-c.embedding).abs().mean(0), logits=o.logits, logits_occ=c.logits,
               k5=nhwc(o.maps[:1]), k5_occ=nhwc(c.maps[:1]), k5_ch0_5=nhwc(o.maps[:1,:5]))
    for k,v in got.items():
        if f'out_{k}' in r: r.close(f'out_{k}', v, 1e-5)
    r.exact('out_keep_mask', o.mask[0])

def losses(r, model, o, y):
    "The six terms with their weights, and the total"
    ident = IdentityLoss(int(r['subjects']))
    got = dict(id=ident(o.logits, y), id_occ=ident(o.covered.logits, y), sad=response_diversity(o.maps),
               sad_occ=response_diversity(o.covered.maps), fad=.1*o.change,
               sad_filter=100*filter_diversity(model.response.out.conv.weight))
    got['total'] = sum(got.values())
    for k,v in got.items(): r.close(f'out_loss_{k}', v, 1e-5)
    return got['total']

def is_noise(name):
    "Is the true gradient zero? Biases of convolutions and the shift of k42's norm (there is no ELU) meet a norm next"
    return name.endswith('biases') or name.replace('/','.') == 'd_k_bn4_2.beta'

def gradients(r, model, x, occ):
    "Of the total: whole arrays, slices and norms; some are zero in theory"
    grads = {k:as_numpy(v) for k,v in model.original_views({k:p.grad for k,p in model.named_parameters()}).items()}
    if 'n_params' in r: r.exact('n_params', sum(g.size for g in grads.values()))
    for k in r.find('grad__(.+)'): r.near(f'grad__{k}', grads[k.replace('.','/')],
                                          1e-4 if is_noise(k) else 1e-3*r.top(f'grad__{k}'))
    for k in r.find('grad_slice__(.+)'): r.close(f'grad_slice__{k}', sliced(grads[k.replace('.','/')]), 1e-3)
    for k in r.find('gradnorm__(.+)'): norm(r, k, grads[k.replace('.','/')])
    if 'grad_x' in r: [r.close(k, nhwc(v.grad), 1e-3) for k,v in (('grad_x',x),('grad_x_occ',occ))]
    if 'gradnorm_x' in r: [r.near('gradnorm_x', v.grad.norm(), 1e-3*abs(r.arrays['gradnorm_x'][i]), at=i) for i,
                           v in enumerate((x,occ))]
    if 'names' in r: named_norms(r, grads)

def norm(r, name, g):
    "One norm"
    key = f'gradnorm__{name}'
    r.near(key, np.linalg.norm(g), 1e-4*math.sqrt(g.size) if is_noise(name) else 1e-3*r.top(key))

def named_norms(r, grads):
    "One norm for each variable, in the order of `names`"
    theirs = r.arrays['names'].tolist()
    r.exact('names', [n for n in theirs if n in grads]+sorted(grads.keys()-set(theirs)))
    for i,n in enumerate(theirs):
        if not is_noise(n): r.near('gradnorm', np.linalg.norm(grads[n]), 1e-3*abs(r.arrays['gradnorm'][i]), at=i)

def as_numpy(v): return v.detach().contiguous().numpy()

def sliced(g):
    "Twelve rows of a large gradient"
    rows = g.reshape(-1, g.shape[-1])
    return rows[::max(1, len(rows)//12)][:12]

def pieces_(r):
    "Single operations"
    for case in r.find('(sad_(?:dense|sparse))_x'): sad(r, case)
    zero_channel(r)
    w = torch.from_numpy(r['sadf_w']).permute(3,2,0,1).requires_grad_()
    loss = filter_diversity(w)
    loss.backward()
    r.close('sadf_loss_unweighted', loss, 1e-5)
    r.close('sadf_grad_unweighted', w.grad.permute(2,3,1,0), 1e-5)
    operations(r)
    adam(r)
    occlusion(r)

def sad(r, case):
    "Loss and gradient on responses"
    m = nchw(r[f'{case}_x']).requires_grad_()
    loss = response_diversity(m)
    loss.backward()
    r.close(f'{case}_loss', loss, 1e-5)
    r.close(f'{case}_grad', nhwc(m.grad), 1e-5)

def zero_channel(r):
    "A silent channel: NaN in the original; here it adds 0, and the others what they add without it"
    m,n = nchw(r['sad_zero_channel_x']),r['sad_zero_channel_loss_original']
    c = m.shape[1]
    alone = [response_diversity(i[None][:,i.abs().amax((1,2)) > 0]) for i in m]
    live = [int((i.abs().amax((1,2)) > 0).sum()) for i in m]
    want = np.mean([a.item()*k*(k-1)/(c*(c-1)) for a,k in zip(alone, live)])
    ours = response_diversity(m).item()
    if not np.isnan(n): r.fail('sad_zero_channel_loss_original is not NaN')
    if not abs(ours-want) <= 1e-5*want: r.fail(f'sad_zero_channel: {ours} instead of {want}')

def operations(r):
    "Upsampling, convolutions, batch norm"
    for k in r.find('(resize_.+)_in'):
        out = _legacy_upsample(nchw(r[f'{k}_in']), r.arrays[f'{k}_out'].shape[1:3])
        r.near(f'{k}_out', nhwc(out), 1e-6)
    w = torch.from_numpy(r['conv_w']).permute(3,2,0,1)
    for s in map(int, r.find(r'conv_stride(\d)')):
        conv = _SameConv2d(w.shape[1], len(w), w.shape[2], s, bias=False)
        with torch.no_grad():
            conv.weight.copy_(w)
            r.near(f'conv_stride{s}', nhwc(conv(nchw(r['conv_x']))), 1e-5)
    bn = nn.BatchNorm2d(len(r['bn_gamma'])).train()
    with torch.no_grad():
        for v,k in ((bn.weight,'gamma'), (bn.bias,'beta'), (bn.running_mean,'mean0'),
                    (bn.running_var,'var0')): v.copy_(r.tensor(f'bn_{k}'))
        r.near('bn_y', nhwc(bn(nchw(r['bn_x']))), 1e-6)
    for k,v in (('mean1',bn.running_mean), ('var1',bn.running_var)): r.near(f'bn_{k}', v, 1e-6)

def adam(r):
    "Parameters after each step"
    theta,steps = r.tensor('adam_theta0').requires_grad_(),[]
    opt = optimizers['adam_hat']([theta], lr=1e-3, betas=(.5,.999))
    for g in r.tensor('adam_grads'):
        theta.grad = g.clone()
        opt.step()
        steps.append(theta.detach().clone())
    r.near('adam_theta', torch.stack(steps), 1e-6)

def occlusion(r):
    "Window masks; the first face has the frontal landmarks, where rounding decides on the outline"
    shape = r['occ_mask_shape']
    theirs = np.unpackbits(r.arrays['occ_mask_bits'])[:np.prod(shape)].reshape(shape).astype(bool)
    mesh = FaceMesh(r['occ_frontal_landmarks'].T+7, r['occ_mesh_triangles'].astype(int))
    marks,ours = r['occ_landmarks'].transpose(0,2,1),np.zeros(shape, bool)
    at,row,col,wh = [r[f'occ_{k}'] for k in ('corner_xy','crop_row','crop_col','window_wh')]
    for t in range(len(at)):
        quads = _warp_windows(mesh, at[t][None], wh, marks)-np.stack([col[t],row[t]], -1)[:,None]
        ours[t] = _fill_polygons(quads, shape[2:]).numpy()
    level = np.abs(marks-mesh.points).max((1,2)) < 1e-9 # faces with the frontal landmarks
    for t,i in np.argwhere((ours != theirs).any((2,3)) & level):
        if (ours[t,i] != theirs[t,i]).sum() <= EDGE: ours[t,i] = theirs[t,i]
    r.exact('occ_mask_bits', np.packbits(ours.ravel()))

def fold(r, kind, k): return Templates.group(*[r[f'{kind}{k}_{c}'] for c in ('template','subject','image')])

def scores(r):
    "Verification and identification by the original's rules"
    f,flags,folds = r['features'],r['visibility'],r.find(r'verify(\d+)_dist')
    r['image_subject']
    rates,ranks = [],[]
    for k in folds:
        rates.append(verification(r, f, flags, k))
        ranks.append(identification(r, f, flags, k))
    moments = [100*np.mean(rates, 0),100*np.std(rates, 0, ddof=1)]
    r.close('verify_mean_std_percent', np.stack(moments, 1).ravel(), 1e-12)
    moments = [100*np.mean(ranks, 0),100*np.std(ranks, 0, ddof=1)]
    r.close('search_mean_std_percent_rank1_5_10', np.stack(moments, 1), 1e-12)
    ijbc(r, f)

def rules(d, same): return np.array([Verification(d[:,s], same, 'original').tar_at_far() for s in range(d.shape[1])])

def verification(r, f, flags, k):
    "One fold, and its subset with natural occlusion; returns TAR of the reported score"
    sets,pairs = fold(r, 'verify', k),r[f'comparison{k}']
    v = sets.verify(f, pairs, rule='original')
    d,same = v['dist'],v['same']
    r.near(f'verify{k}_dist', d, 1e-12)
    r.exact(f'verify{k}_same', same)
    r.exact(f'verify{k}_acc', rules(d, same))
    pairs_of = [Verification(d[:,s], same, 'original') for s in range(3)]
    curves = [np.stack(c, 1) for c in zip(*[v.curve[:2] for v in pairs_of])]
    for name,c in zip((f'verify{k}_tar',f'verify{k}_far'), curves):
        if name in r: r.near(name, c, 1e-12)
    o = sets.occluded(flags).distances(f, pairs, compat=True)
    used = ~np.isnan(o[:,0])
    r.exact(f'verify_occluded{k}_used', used)
    r.near(f'verify_occluded{k}_dist', np.where(used[:,None], o, 0), 1e-12)
    r.exact(f'verify_occluded{k}_acc', rules(o[used], same[used]))
    return v['tar']

def identification(r, f, flags, k):
    "One fold, and its subset with natural occlusion; returns rank-1, 5 and 10"
    probes,gallery = fold(r, 'probe', k),fold(r, 'gallery', k)
    closed = np.isin(probes.subject, gallery.subject)
    r.exact(f'search{k}_probe_template', probes.ids[closed])
    r.exact(f'search{k}_gallery_template', gallery.ids)
    ranks = range(1, len(r.arrays[f'search{k}_rank_curve'])+1)
    curve = []
    for name,p,g in ((f'search{k}',probes,gallery), (f'search_occluded{k}',probes.occluded(flags),gallery.occluded(flags))):
        s = p.search(f, g, 'original', ranks)
        r.near(f'{name}_dist', np.nan_to_num(s['dist'][closed], nan=100.), 1e-12)
        r.exact(f'{name}_rank_curve', np.array(s['rank']))
        curve.append(s['rank'])
    return [curve[0][i-1] for i in (1,5,10)]

def padded(r, side):
    "Templates of rows of images padded with -1"
    t,s,im = [r[f'ijbc_{side}_{c}'] for c in ('template','subject','images')]
    n = np.full(len(t), im.shape[1])
    rows = Templates.group(np.repeat(t, n), np.repeat(s, n), np.maximum(im, 0).ravel())
    rows.images = im.ravel()[np.argsort(np.repeat(t, n), kind='stable')]
    ok = rows.images >= 0
    return type(rows)(rows.ids, rows.subject, rows.images[ok], np.concatenate([[0], np.cumsum(ok)])[rows.start])

def ijbc(r, f):
    "Pooled templates"
    g,p = [padded(r, s) for s in ('G1','G2')],padded(r, 'probe')
    sets = g+[p]
    pooled = np.concatenate([t.pooled(f) for t in sets])
    ids,subject = [np.concatenate([getattr(t, k) for t in sets]) for k in ('ids','subject')]
    where = {t:i for i,t in enumerate(ids.tolist())}
    a,b = np.array([[where[t] for t in pair] for pair in r['ijbc_pairs'].tolist()]).T
    d,same = Templates.pooled_distances(pooled, a, b),subject[a] == subject[b]
    ok = ~np.isnan(d)
    r.near('ijbc_dist', d[ok], 1e-12)
    r.exact('ijbc_same', same[ok])
    v = Verification(d, same, 'original')
    r.exact('ijbc_acc', np.array(v.tar_at_far()))
    for name,c in zip(('ijbc_tar','ijbc_far'), v.curve): r.near(name, c, 1e-12)
    gallery = np.concatenate([t.subject for t in g])
    search = Templates.pooled_distances(p.pooled(f), other=np.concatenate([t.pooled(f) for t in g]))
    used = np.isin(p.subject, gallery) & ~np.isnan(search).all(1)
    full = ~np.isnan(search[used]).all(0)
    r.near('ijbc_search_dist', search[used][:,full], 1e-12)
    r.exact('ijbc_search_probe_subject', p.subject[used].astype(float))
    n = len(r.arrays['ijbc_search_rank_curve'])
    found = Identification(search[used][:,full], p.subject[used], gallery[full], 'original')
    ranks = found.rank_rates(range(1, n+1))
    r.exact('ijbc_search_rank_curve', np.array(ranks))

def locations(r):
    "Average location of peak responses"
    marks = r['landmarks'].transpose(0,2,1)
    mesh = FaceMesh(marks[r['front_index']], r['triangles'].astype(int))
    peaks = Peaks().add(nchw(r['maps']))
    loc = average_locations(peaks, tuple(int(r['stride'])*s for s in peaks.grid), mesh, marks, compat=True)
    for i,s in enumerate(('pos','neg')):
        r.near(f'{s}_center_yx', loc.center[i,:,::-1], 1e-9)
        r.near(f'{s}_deviation', loc.deviation[i], 1e-9)

pieces = dict(net=net, pieces=pieces_, eval=scores, locations=locations)
