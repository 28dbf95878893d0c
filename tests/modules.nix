# Evaluates Bento's modules on a NixOS that has just the options they touch, and reports what they make of it.
{
  # Nixpkgs' lib, or our own.
  lib ? import ./evalmodules.nix,
  # Show the text of the file of known hosts where the module names the file.
  inline ? false,
  # Whether the machine that builds can run the host's programs.
  native ? true,
  # Whether it is a NixOS of before 25.11, whose options for systemd's own settings had another name each.
  old ? false,
}:

let
  inherit (lib) mkOption types;

  package = name: {
    type = "derivation";
    inherit name;
    version = "10.2";
    outPath = "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-${name}";
  };

  pkgs =
    builtins.listToAttrs (
      map
        (name: {
          inherit name;
          value = package name;
        })
        [
          "bash"
          "coreutils"
          "curl"
          "firefox"
          "gitMinimal"
          "gnutar"
          "grub2"
          "gzip"
          "iputils"
          "libreoffice"
          "nix"
          "nixos-rebuild"
          "nvd"
          "openssh"
          "python3"
          "python3Minimal"
          "systemd"
          "xz"
        ]
    )
    // {
      writeText =
        name: text:
        package name // (if inline && name == "bento-known-hosts" then { outPath = text; } else { });
      writeShellScriptBin = name: text: package name // { inherit text; };
      # To be seen in what the package is used for.
      runCommandLocal = name: _: text: package name // (if inline then { outPath = text; } else { });
      stdenv = {
        buildPlatform.canExecute = platform: native && platform == "host";
        hostPlatform = "host";
      };
    };

  option =
    type: default:
    mkOption {
      inherit type default;
    };
  attrs = option (types.attrsOf types.anything) { };

  nixos = {
    options = {
      assertions = option (types.listOf types.anything) [ ];
      boot = {
        initrd = {
          availableKernelModules = option (types.listOf types.str) [ ];
          extraUtilsCommands = option types.lines "";
          luks.devices = attrs;
          preDeviceCommands = option types.lines "";
          systemd = {
            enable = option types.bool (!old);
            services = attrs;
            storePaths = option (types.listOf types.anything) [ ];
          };
        };
        kernelParams = option (types.listOf types.str) [ ];
        lanzaboote.enable = option types.bool false;
        loader = {
          efi.efiSysMountPoint = option types.str "/boot";
          grub = {
            enable = option types.bool false;
            extraConfig = option types.lines "";
            mirroredBoots = option (types.listOf types.anything) [ ];
            users = attrs;
          };
          external.enable = option types.bool false;
          generationsDir.enable = option types.bool false;
          generic-extlinux-compatible.enable = option types.bool false;
          initScript.enable = option types.bool false;
          limine.enable = option types.bool false;
          refind.enable = option types.bool false;
          systemd-boot = {
            enable = option types.bool false;
          }
          // lib.optionalAttrs (!old) { xbootldrMountPoint = option (types.nullOr types.str) null; };
        };
      };
      environment = {
        etc = attrs;
        sessionVariables = attrs;
        systemPackages = option (types.listOf types.package) [ ];
      };
      networking = {
        hostName = option types.str "nixos";
        proxy.envVars = attrs;
      };
      nix = {
        channel.enable = option types.bool true;
        enable = option types.bool true;
        envVars = attrs;
        package = option types.package pkgs.nix;
      };
      programs.ssh.package = option types.package pkgs.openssh;
      security.pam = {
        loginLimits = option (types.listOf types.anything) [ ];
        services = attrs;
      };
      services.openssh = {
        enable = option types.bool false;
        extraConfig = option types.lines "";
        settings = attrs;
      };
      system = {
        autoUpgrade.enable = option types.bool false;
        nixos.release = option types.str "25.11";
      };
      systemd = {
        enableEmergencyMode = option types.bool true;
        package = option types.package pkgs.systemd;
        services = attrs;
        sockets = attrs;
        timers = attrs;
        tmpfiles.rules = option (types.listOf types.str) [ ];
      }
      // (
        if old then
          { watchdog.runtimeTime = option (types.nullOr types.str) null; }
        else
          { settings.Manager = attrs; }
      );
      users = {
        groups = attrs;
        users = attrs;
      };
    };
    config = {
      # As the real module has it, and in its place among the rules: each has a hundred of its own.
      security.pam.services.sshd.rules.session.systemd = {
        enable = lib.mkDefault true;
        order = 12600;
      };
      environment.sessionVariables.NIX_PATH = "nixpkgs=/channels/nixos:nixos-config=/etc/nixos/configuration.nix";
      system.build.nixos-rebuild = pkgs.nixos-rebuild;
    };
  };

  # What a real NixOS has options for, and these tests do not look at. Our own lib takes it without asking.
  rest = if lib ? strings then [ { freeformType = types.attrsOf types.anything; } ] else [ ];

  eval =
    modules:
    lib.evalModules {
      modules = [ nixos ] ++ rest ++ modules;
      specialArgs = {
        inherit pkgs;
      };
    };

  failed = config: map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);

  document =
    prefix: node:
    if lib.isOption node then
      {
        ${prefix} = {
          description = node.description;
        }
        // (
          if node ? defaultText then
            { default = node.defaultText.text; }
          else if node ? default then
            { default = builtins.toJSON node.default; }
          else
            { }
        )
        // (
          if node ? example then
            { example = node.example.text or (builtins.toJSON node.example); }
          else
            { }
        );
      }
    else
      builtins.foldl' (all: name: all // document "${prefix}.${name}" node.${name}) { } (
        builtins.attrNames node
      );
in
{
  inherit eval;

  # A host, from its modules.
  host =
    modules:
    let
      inherit (eval modules) config;
      commands = builtins.filter (p: p.name == "bento-client") config.environment.systemPackages;
      settings = builtins.fromJSON config.environment.etc."bento/client.json".text;
    in
    if failed config != [ ] then
      { failed = failed config; }
    else
      {
        inherit settings;
        commands = map (c: c.text) commands;
        inherit (config.systemd) services sockets timers;
      };

  # What a host's modules say of its boot.
  boot =
    modules:
    let
      inherit (eval modules) config;
    in
    {
      loader = (builtins.fromJSON config.environment.etc."bento/client.json".text).boot_loader;
      grub = config.boot.loader.grub.extraConfig;
      params = config.boot.kernelParams;
      emergency = config.systemd.enableEmergencyMode;
      watchdog =
        if old then config.systemd.watchdog.runtimeTime else config.systemd.settings.Manager.RuntimeWatchdogSec or null;
      inherit (config.boot) initrd;
      ends = config.systemd.services.bento-trial-ends or null;
      inherit ((builtins.fromJSON config.environment.etc."bento/client.json".text)) asks;
    };

  # A server, from its modules.
  server =
    modules:
    let
      inherit (eval modules) config;
    in
    {
      inherit (config.users) users groups;
      tmpfiles = config.systemd.tmpfiles.rules;
      limits = config.security.pam.loginLimits;
      pam = config.security.pam.services;
      inherit (config.services.openssh) enable settings extraConfig;
    };

  # What a server runs besides sshd, from its modules.
  serverUnits =
    modules:
    let
      inherit (eval modules) config;
      commands = builtins.filter (p: p.name == "bento") config.environment.systemPackages;
    in
    {
      failed = failed config;
      commands = map (c: c.text) commands;
      settings = config.nix.settings or { };
      inherit (config.systemd) services timers;
    };

  # Every option of the host's module, and of the server's.
  options = module: document "services.bento" (eval [ module ]).options.services.bento;
  serverOptions =
    module: document "services.bento-server" (eval [ module ]).options.services.bento-server;
}
