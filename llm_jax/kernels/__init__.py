"""Attention back ends behind one capability table, their masks, and the cross-entropy."""
