{
  description = "A laptop: a flake of several files";

  # `bento.py update` on the Bento server pins this. Without a lock file, each machine takes what is newest when it
  # builds.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      # The name is the one of the directory in hosts/.
      nixosConfigurations.t470 = nixpkgs.lib.nixosSystem {
        modules = [ ./configuration.nix ];
      };
    };
}
