"""The second folder of the demo's nnUNet_extTrainer: nnU-Net imports the modules beside this file as top-level ones."""
