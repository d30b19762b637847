"""What this computer is and has, found without torch: memory, disks, processors, the NVIDIA driver's view."""
