"""Several backbones under one loss: the same data, steps and seeds, with a control that trains without TTD."""
