"""Train and test detectors from mmdet's Python configs, on mmengine's Runner."""

import vitarium.heads.mmdet  # noqa: F401  (operators, which mmdet wants when it is imported)
