# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Classifiers of other libraries
#
# > Six networks that know nothing of this library: explained with words, saved, and asked again in a fresh process

# %%
import pandas as pd

# %% [markdown]
# ## The question
#
# [Explain your own classifier](../tutorials/explain_your_classifier.ipynb) gives visual words to a timm ResNet. Does the same path take convolutions with channels last, tokens with registers, windows and a fastai `Learner`? Are the words faithful to each? Does a saved run answer the same in a fresh process?
#
# ```sh
# python tools/own_classifiers.py
# ```
#
# 320 images of two discs in random places at 48 px, of four classes that are pairs of colours; 240 of them train. Each network starts from random numbers and is trained by a plain PyTorch loop, the last one by `Learner.fit_one_cycle`. It then gets twenty words on a copy of its own layers, in twelve epochs. Chance is 0.25. One thread, seed 0.

# %%
table = pd.read_csv('own_classifiers.csv')
table.set_index('network').drop(columns=['seconds']).round(3)

# %% [markdown]
# ## How to read it
#
# | column | |
# |---|---|
# | `layer`, `map` | the submodule whose output is explained; its channels and cells, found by the library for every layout |
# | `accuracy`, `words_accuracy` | of the classifier, and of the words, on test images |
# | `agreement` | share of the test images on which the words give the classifier's answer |
# | `iou` | overlap of the more active halves of two maps: the words' and the classifier's Grad-CAM of the same image |
# | `iou_mean_cam`, `iou_shuffled` | the same with the mean Grad-CAM of the training images, and with the words' map of another image |
# | `built_by` | *the run*: its `config.json` says how to build the network again. *your code*: no name of timm or torchvision gives this architecture, and you pass it to `load_run(run, features=LayerMap(net, layer))` |
# | `logits_off` | largest difference of a test logit between this process and a fresh one that loaded the run |

# %% [markdown]
# ## What it says
#
# WHAT
#
# ## Limits
#
# Small networks, small images, one seed, and classes that a colour tells. The table shows that every layout goes the whole way and that the maps belong to the images; it does not rank architectures. A network whose logits depend on the class token alone has no gradient at the output of its last block: its layer is that block's first norm, as in the row of torchvision's ViT. `BaseModel` refuses a later layer with one line that says so.

# %%
#| hide
assert len(table) == 6 and table.network.is_unique
assert (table.accuracy > .5).all() and (table.logits_off <= 1e-5).all()
