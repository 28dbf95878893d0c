# As `nixos-generate-config` wrote it, in short.
{
  nixpkgs.hostPlatform = "x86_64-linux";

  boot.loader.grub.device = "/dev/sda";
  boot.initrd.availableKernelModules = [
    "ahci"
    "sd_mod"
  ];

  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };

  # So that the names of the two ports do not depend on the order in which they are found.
  systemd.network.links = {
    "10-wan0" = {
      matchConfig.PermanentMACAddress = "00:00:5e:00:53:01";
      linkConfig.Name = "wan0";
    };
    "10-lan0" = {
      matchConfig.PermanentMACAddress = "00:00:5e:00:53:02";
      linkConfig.Name = "lan0";
    };
  };
}
