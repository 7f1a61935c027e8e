"""raycap: fine-tune vision-language models to caption images, sweep, gate and serve them on Ray."""

__version__ = "0.1.0"
