/** The links of a machine, looked up by their ends, and the words that stand at them. */

import type { Translate } from '../../i18n'
import type { DeviceState, LinkState, MachineState } from '../../wire'
import { busWords, type Label, stepLabel, upDownWords, wrapped } from './labels'
import type { Path, Step } from './path'

export class Links {
  constructor(
    private readonly state: MachineState,
    private readonly path: Path,
    private readonly t: Translate,
  ) {}

  /** All from one of these devices to one of those. */
  from(sources: DeviceState[], targets: DeviceState[]): LinkState[] {
    const has = (devices: DeviceState[], id: string) => devices.some(device => device.id === id)
    return this.state.links.filter(link => link.source !== link.target && has(sources, link.source) && has(targets, link.target))
  }

  /** All between two devices, whichever way. */
  between(one: DeviceState, other: DeviceState): LinkState[] {
    return [...this.from([one], [other]), ...this.from([other], [one])]
  }

  stepsOver(links: LinkState[]): Step[] {
    return this.path.steps.filter(step => links.some(link => link.source === step.source && link.target === step.target))
  }

  /** Words for the links between two; what comes from `lower` climbs. */
  label(lower: DeviceState, upper: DeviceState, room: number): Label {
    const links = this.between(lower, upper)
    if (!links.length) return this.labelOf([], [], room)
    return this.labelOf(links, [busWords(links, 1, this.t), upDownWords(this.from([lower], [upper]), this.from([upper], [lower]), this.t)], room)
  }

  /** Words for all links from one device to several, as one. */
  commonLabel(lower: DeviceState, uppers: DeviceState[], room: number): Label {
    const [up, down] = [this.from([lower], uppers), this.from(uppers, [lower])]
    const count = Math.max(up.length, down.length)
    const speed = upDownWords(up, down, this.t)
    const words = [busWords([...up, ...down], count, this.t), count > 1 ? this.t('machineEachSpeed', { speed }) : speed]
    return this.labelOf([...up, ...down], words, room)
  }

  /** Words for the links of GPUs among themselves. */
  fabricLabel(gpus: DeviceState[], room: number): Label {
    const links = this.from(gpus, gpus)
    const pairs = new Set(links.map(link => pair(link)))
    const speed = `↔ ${upDownWords(links, links, this.t).replace('↕ ', '')}`
    const words = [busWords(links, 1, this.t), pairs.size > 1 ? this.t('machineAmong') : '', speed]
    return { ...this.labelOf(links, words, room), anchor: 'middle' }
  }

  private labelOf(links: LinkState[], words: string[], room: number): Label {
    return { x: 0, y: 0, anchor: 'start', lines: wrapped(words, room), step: stepLabel(this.stepsOver(links), this.path, this.t) }
  }
}

/** The same for both ways between two devices. */
export function pair({ source, target }: { source: string; target: string }): string {
  return [source, target].sort().join('↔')
}
