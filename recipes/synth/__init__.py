"""Images from models alone: feature mixing over several models, data mixing for exact labels (MixMix, ICCV 2021)."""
