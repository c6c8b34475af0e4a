"""What all trainers share: the conductor of several networks, their teachers, and parts that methods are made of.

May import nnU-Net, `data` and `losses`. A new method belongs to `trainers`, and nothing here has to change for it.
"""
