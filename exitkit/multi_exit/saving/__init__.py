"""Saved and shared: what exitkit added, in a folder or on the Hugging Face Hub."""

from exitkit.multi_exit.saving.folder import load_exits, push_exits, save_exits

__all__ = ["load_exits", "push_exits", "save_exits"]
