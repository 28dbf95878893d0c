{
  description = "A file server: a flake in one file";

  # `bento.py update` on the Bento server pins this. Without a lock file, each machine takes what is newest when it
  # builds.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      # The name is the one of the directory in hosts/.
      nixosConfigurations.nas = nixpkgs.lib.nixosSystem {
        modules = [
          ./utils/bento.nix
          {
            networking.hostName = "nas";
            # ZFS wants to know which machine a pool belongs to.
            networking.hostId = "0b3e7700";

            services.bento = {
              server = "bento.example.org";
              # No hurry: once an hour, the fleet spread over that hour.
              interval = "hourly";
              randomizedDelay = "1h";
              healthChecks = [ "systemctl is-active nfs-server.service" ];
            };

            services.nfs.server = {
              enable = true;
              exports = "/srv 10.0.0.0/24(rw,no_subtree_check)";
            };
            networking.firewall.allowedTCPPorts = [ 2049 ];

            nixpkgs.hostPlatform = "x86_64-linux";
            boot.loader.systemd-boot.enable = true;
            boot.supportedFilesystems = [ "zfs" ];
            fileSystems = {
              "/" = {
                device = "/dev/disk/by-label/nixos";
                fsType = "ext4";
              };
              "/boot" = {
                device = "/dev/disk/by-label/ESP";
                fsType = "vfat";
              };
              "/srv" = {
                device = "tank/srv";
                fsType = "zfs";
              };
            };

            system.stateVersion = "25.11";
          }
        ];
      };
    };
}
