"""A program of a user's, for its types: what exitkit's functions take and return is known to a type checker."""

from typing import assert_type

import torch

import exitkit

model = exitkit.models.cifar_resnet(8).eval()
ee = exitkit.attach(model, torch.randn(2, 3, 32, 32), every=1, head="1L", method="ztw")
assert_type(ee, exitkit.MultiExitModel)
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
outputs = exitkit.collect(ee, [(images, labels)])
point = outputs.curve().at_budget(1.0)
assert_type(point.policy, exitkit.ExitPolicy)
engine = exitkit.compile(ee, point)
assert_type(engine, exitkit.Engine)
prediction = engine(images)
assert_type(prediction, exitkit.Prediction)
assert_type(prediction.exit, torch.Tensor)
