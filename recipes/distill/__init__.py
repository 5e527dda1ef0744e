"""Distillation without data: one classifier learns from another on images made from models."""
