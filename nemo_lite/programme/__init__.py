"""Programmes: folders of stages, each a recipe with inputs and outputs, and what runs, reports and watches them."""
