"Six classifiers of other libraries, explained with words, saved, and asked again in a fresh process: `python tools/own_classifiers.py [NAME ...] [--out FILE]`"
import argparse, copy, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd, timm, torch, torchvision
from fastai.learner import Learner
from fastai.vision.learner import create_vision_model
from torch import nn

from interp_parts.data.loaders import PartBatches, part_dls
from interp_parts.files import read_json
from interp_parts.networks import LayerMap
from interp_parts.testing.toys import disc_table
from interp_parts.training.fit import fit_run
from interp_parts.training.optim import seed_everything
from interp_parts.training.runs import load_run, run_config, save_run
from interp_parts.visual_words.base import BaseModel
from interp_parts.visual_words.model import visual_words_learner
from interp_parts.visual_words.scores import evaluate_words

CLASSES,SIZE = 4,48
ROOT = Path(__file__).resolve().parents[1]

def resnet(): return timm.create_model('test_resnet', num_classes=CLASSES, output_stride=8)
def convnext(): return timm.create_model('test_convnext', num_classes=CLASSES)
def vit(): return timm.create_model('test_vit2', num_classes=CLASSES, img_size=SIZE, patch_size=8, reg_tokens=4)
def swin():
    return timm.create_model('swin_tiny_patch4_window7_224', num_classes=CLASSES, img_size=SIZE, window_size=3, embed_dim=48,
                             depths=(2,2), num_heads=(2,4))
def torchvision_vit(): return torchvision.models.VisionTransformer(SIZE, 8, 4, 4, 64, 128, num_classes=CLASSES)
def resnet18(): return create_vision_model(torchvision.models.resnet18, CLASSES, pretrained=False)

NETWORKS = { # the network, the layer whose map is explained, epochs and learning rate of its own training
    'timm ResNet':(resnet, 'layer4', 8, 3e-3),
    'timm ConvNeXt':(convnext, 'stages.1', 20, 4e-3),
    'timm ViT, 4 registers':(vit, 'blocks.7', 25, 2e-3),
    'timm Swin':(swin, 'layers', 25, 2e-3),
    'torchvision ViT':(torchvision_vit, 'encoder.layers.encoder_layer_3.ln_1', 25, 2e-3),
    'fastai Learner, ResNet-18':(resnet18, '0.5', 6, 2e-3)}

def discs(
    folder, # Where the images are, or will be
):
    "Table and loaders of images of two discs in random places, whose colours are the class"
    df = disc_table(folder, n=320, n_classes=CLASSES, size=SIZE)
    return df,part_dls(df, size=SIZE, resize='squash', bs=32, brightness=0., device='cpu')

def trained(
    make, # Function without arguments that makes a network
    dls, # From `discs`
    epochs:int, # Passes over the training images
    lr:float, # Highest learning rate
):
    "A network after a plain PyTorch training; the fastai network as the `Learner` that trained it"
    seed_everything(0)
    if make is resnet18:
        learn = Learner(dls, make(), loss_func=nn.CrossEntropyLoss())
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
        return learn
    x,y = (torch.cat(v) for v in zip(*((x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in dls.train)))
    net = make().train()
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs*(len(x)//32))
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[:len(x)//32*32].view(-1, 32):
            opt.zero_grad()
            images = x[rows].flip(-1) if torch.rand(()) < .5 else x[rows]
            nn.functional.cross_entropy(net(images), y[rows]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.)
            opt.step()
            plan.step()
    return net.eval()

def answers(
    learn, # Of words
    df, # From `discs`
):
    "Logits of the test images"
    return learn.logits(df[df.split == 'test'])[0]

def again(
    run, # Folder of a run of words
    name:str, # One of `NETWORKS`
    folder, # Of the images
    out, # File of the logits
):
    "What a fresh process answers: the run builds its network, or is given one of the same code"
    make,layer,*_ = NETWORKS[name]
    known = bool(read_json(Path(run)/'config.json')['network'])
    torch.save(answers(load_run(run, features=None if known else LayerMap(make(), layer, SIZE)), discs(folder)[0]), out)

def explained(
    name:str, # One of `NETWORKS`
    folder, # Of the images
)->dict:
    "A row of the table: the classifier, its words, and whether a fresh process gives the same answers"
    start,(make,layer,epochs,lr) = time.time(),NETWORKS[name]
    df,dls = discs(folder)
    net = trained(make, dls, epochs, lr)
    base,test = BaseModel(net, layer),df[df.split == 'test']
    own = torch.cat([(base(x).argmax(1) == b.label).float() for x,b in PartBatches(test, SIZE, 'squash')]).mean().item()
    seed_everything(0)
    learn = visual_words_learner(dls, n_parts=5*CLASSES, base=base, depth=32, cluster=.3, attend_warm=True)
    with learn.no_bar(), learn.no_logging(): fit_run(learn, 12, lr=(1e-3,3e-3), clip=2.)
    s,iou = evaluate_words(learn, df),'attention_iou_50'
    return dict(network=name, layer=layer, map=f'{learn.model.backbone.channels} x {SIZE//learn.model.backbone.stride}²',
                accuracy=own, words_accuracy=s['accuracy'], agreement=s['base_agreement'], iou=s[iou],
                iou_mean_cam=s[f'{iou}_mean_cam'], iou_shuffled=s[f'{iou}_shuffled'],
                **saved(name, learn, folder, df), seconds=round(time.time()-start))

def saved(
    name:str, # One of `NETWORKS`
    learn, # Of words on it
    folder, # Of the images
    df, # From `discs`
)->dict:
    "Who builds the network when its run is loaded in a fresh process, and how far the answers are off"
    with tempfile.TemporaryDirectory() as tmp:
        run,out = Path(tmp)/'run',Path(tmp)/'logits.pt'
        save_run(learn, run, run_config(learn, 'visual_words'))
        subprocess.run([sys.executable, __file__, '--again', run, name, folder, out], check=True)
        known = bool(read_json(run/'config.json')['network'])
        return dict(built_by='the run' if known else 'your code', logits_off=(torch.load(out) - answers(learn, df)).abs().max().item())

def briefly(
    name:str, # One of `NETWORKS`
    folder, # Where the images are, or will be
)->dict:
    "`saved` of words before their first step, on a network of one epoch"
    (make,layer,_,lr),(df,dls) = NETWORKS[name],discs(folder)
    learn = visual_words_learner(dls, n_parts=5*CLASSES, base=BaseModel(trained(make, dls, 1, lr), layer), depth=32)
    return dict(network=name, **saved(name, learn, folder, df))

def main():
    "Explain the classifiers named, or all, and write the table"
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('names', nargs='*', metavar='NAME', help=f'of {list(NETWORKS)}; default all')
    p.add_argument('--images', default=str(Path(tempfile.gettempdir())/'own_classifiers_discs'), help='folder of the images')
    p.add_argument('--out', default=str(ROOT/'nbs'/'results'/'own_classifiers.csv'), help='the table')
    p.add_argument('--brief', action='store_true', help='only ask again who builds the networks, after one epoch')
    p.add_argument('--again', nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.again: return again(*a.again)
    rows = pd.read_csv(a.out).to_dict('records') if Path(a.out).exists() else []
    for name in a.names or NETWORKS:
        old = next((r for r in rows if r['network'] == name), {})
        row = {**old, **briefly(name, a.images)} if a.brief else explained(name, a.images)
        print(row, flush=True)
        at = [r['network'] for r in rows].index(name) if old else len(rows)
        rows = [*rows[:at], row, *rows[at+1:]]
        pd.DataFrame(rows).round(4).to_csv(a.out, index=False)

if __name__ == '__main__': main()
