"""What training scripts import: `import shoal.pytorch as sp`. Needs torch: `pip install 'shoal[train]'`."""

from shoal.pytorch.hook import TreeReduce, tree_hook
from shoal.pytorch.join import Batch, TrainingRun, join

__all__ = ["Batch", "TrainingRun", "TreeReduce", "join", "tree_hook"]
