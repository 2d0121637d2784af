"""freqdoor: plant and measure backdoors in learned image codecs.

What is public stands in `__init__.pyi`, and is loaded when it is used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
