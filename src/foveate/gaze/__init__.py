"""Human gaze: scanpaths and saliency, models that predict them, and the measures that compare them."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
