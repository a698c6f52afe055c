"""Writes digits.npz, the data of example.toml: scikit-learn's 8x8 digits in [0, 1], without their labels."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

x = load_digits().data.astype("float32") / 16
np.savez("digits.npz", x_train=x[:1500], x_test=x[1500:])
