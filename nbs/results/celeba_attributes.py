# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Attributes of faces, three seeds
#
# > Region grouping beside the plain classifier and the most frequent answer

# %% [markdown]
# ## The question
#
# What do parts cost, or gain, where a face has forty attributes?

# %% [markdown]
# ## The setting
#
# 2,589 aligned images of CelebA at half their size: 1,833 of 70 % of the people to train on, 503 of 20 % of the people to test on; no person is in two parts. Attributes are the official
# ones, the split is not. Both methods have the same backbone, weights, views and schedule. The two epochs are what a shared core had time for.
#
# ```sh
# for SEED in 0 1 2; do for METHOD in region_grouping classifier; do
#   interp-parts train $METHOD --data celeba --path CelebA --out $METHOD-$SEED --backbone mobilenetv2_100 --weights mobilenet_v2_imagenet.safetensors \
#     --freeze-bn --size 96 --epochs 2 --bs 32 --workers 0 --seed $SEED
#   interp-parts evaluate $METHOD-$SEED --protocol accuracy
# done; done
# ```

# %%
import pandas as pd

# %%
table = pd.read_csv('celeba_attributes.csv')
table.groupby('model', sort=False).accuracy.agg(['mean','std','min','max','size']).round(4)

# %% [markdown]
# ## What it means
#
# Accuracy is the mean over forty attributes.

# %% [markdown]
# ## Limits
#
# A small network, small images, a short training and one pack of people. The published training on 162,770 images was not run.

# %% [markdown]
# ## Edge cases

# %%
#| hide
from fastcore.test import *

# %%
#| hide
test_eq(table.groupby('model').seed.nunique().to_dict(), dict(classifier=3, majority=3, region_grouping=3, untrained=3))
assert table[table.model == 'region_grouping'].accuracy.min() > table[table.model == 'majority'].accuracy.max()
